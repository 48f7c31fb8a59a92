"""Blocks compiled one by one: the values of eager steps, one compilation, and none in a second start."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import RecompileError

from fastbeit.config.pretrain import Config
from fastbeit.config.running import EngineConfig
from fastbeit.data.sampling import drop_path_keep
from fastbeit.engine.protocol import compiled_before, compiles, make_engine
from fastbeit.engine.ranks import World
from fastbeit.jobs.pretrain import blank_inputs
from fastbeit.model.beit import make_beit
from fastbeit.train.optim import make_optimizer
from fastbeit_kernels.backend import INTERPRETED
from helpers.tiny import SETTINGS
from helpers.waiting import finished

NUM_WORDS = 32
ALONE = World(0, 1, torch.device("cpu"))


def settings(compiled: Any, **kernels: str) -> Config:
    return Config.model_validate(SETTINGS | {"engine": {"name": "single", "compile": compiled}, "kernels": kernels})


def batches(config: Config, num_steps: int) -> Iterator[tuple[Tensor, ...]]:
    """Noise, other words and other dropped branches in each step."""
    for step in range(num_steps):
        gen = torch.Generator().manual_seed(step)
        images, masked, slots, targets, _ = blank_inputs(config, 8, torch.device("cpu"))
        images.random_(0, 256, generator=gen)
        targets.random_(0, NUM_WORDS, generator=gen)
        keep = torch.from_numpy(drop_path_keep(0, step, torch.arange(8).numpy(), config.model.drop_rates))
        yield images, masked, slots, targets, keep


def train(
    config: Config,
    num_steps: int = 5,
    accumulate: int = 2,
    after_first: Callable[[], None] = lambda: None,
    world: World = ALONE,
) -> tuple[list[float], nn.Module]:
    """Losses of steps with micro-batches, and the trained model."""
    torch.manual_seed(0)
    model = make_beit(config, NUM_WORDS)
    engine = make_engine(config.engine, config.optim, model, make_optimizer(model, config.optim), world, accumulate)
    losses = []
    for tensors in batches(config, num_steps):
        parts = list(zip(*(tensor.chunk(accumulate) for tensor in tensors), strict=True))
        sums = [engine.accumulate(part, torch.tensor(48), part is parts[-1])[0] for part in parts]
        engine.step()
        losses.append(sum(one.item() for one in sums))
        if len(losses) == 1:
            after_first()
    return losses, model


def no_recompilation() -> AbstractContextManager:
    return torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture
def tracing_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without code generation: the question is what is traced and when, not what the compiler makes of it."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


# Dynamo looks at .grad of what checkpointing and autograd functions hand on
ignore_grad = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.*should not be instantiated:DeprecationWarning",
)


@ignore_grad
@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="interprets"))]
)
def test_compiled_steps_equal_eager_ones(tracing_alone: None, backend: str):
    """Five steps of two micro-batches, with drop path: after the first nothing is compiled again."""
    eager, _ = train(settings("off", backend=backend))
    with ExitStack() as stack:
        compiled, _ = train(
            settings("on", backend=backend), after_first=lambda: stack.enter_context(no_recompilation())
        )
    assert compiled == pytest.approx(eager, rel=1e-6)


@ignore_grad
def test_a_look_compiles_nothing(tracing_alone: None):
    """A validation has batches of another size; it runs the blocks as they are written."""
    config = settings("on")
    _, model = train(config, num_steps=1)
    images, masked, *_ = (tensor[:3] for tensor in next(batches(config, 1)))
    with torch.no_grad(), no_recompilation(), torch.compiler.set_stance("force_eager"):
        logits = model.logits(images, masked)  # pyright: ignore[reportCallIssue]
    assert logits.shape == (3, 16, NUM_WORDS)
    with torch.no_grad(), no_recompilation(), pytest.raises(RecompileError):
        model.logits(images, masked)  # pyright: ignore[reportCallIssue]


@ignore_grad
def test_two_graphs_serve_all_blocks(tracing_alone: None):
    """One for the last block, which has slots, and one for the others."""
    torch._dynamo.utils.counters.clear()
    config = Config.model_validate(settings("on").model_dump() | {"model": SETTINGS["model"] | {"depth": 5}})
    train(config, num_steps=1, accumulate=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@ignore_grad
def test_ddp_does_not_cut_a_block(tracing_alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Gradients of a block of BEiT-B, 28 MB, fill more than one of DDP's buckets of 25 MiB."""
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    # what Dynamo cuts in two reaches the compiler as two graphs, and is one in its own count
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    wide = SETTINGS["model"] | {"width": 768, "mlp_width": 3072, "num_heads": 12, "depth": 3}
    config = Config.model_validate(settings("on").model_dump() | {"model": wide})
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    try:
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        train(config, num_steps=1, accumulate=1, world=World(0, 1, torch.device("cpu"), group))
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 2


@pytest.mark.parametrize("said, meant", [("on", "on"), (True, "on"), ("off", "off"), (False, "off"), ("auto", "auto")])
def test_on_and_off_as_yaml_reads_them(said: Any, meant: str):
    assert EngineConfig(compile=said).compile == meant


def test_auto_compiles_on_cuda_alone():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiles(EngineConfig(), cuda) and not compiles(EngineConfig(), cpu)
    assert compiles(EngineConfig(compile="on"), cpu) and not compiles(EngineConfig(compile="off"), cuda)


@pytest.mark.parametrize(
    "hits, misses, said",
    [
        (0, 0, ""),
        (0, 2, "; a cold start, 0 of 2 graphs were compiled before"),
        (1, 1, "; a cold start, 1 of 2 graphs were compiled before"),
        (2, 0, "; a warm start, 2 of 2 graphs were compiled before"),
    ],
)
def test_a_start_is_cold_or_warm(hits: int, misses: int, said: str, monkeypatch: pytest.MonkeyPatch):
    counts = Counter(fxgraph_cache_hit=hits, fxgraph_cache_miss=misses)
    monkeypatch.setitem(torch._dynamo.utils.counters, "inductor", counts)
    assert compiled_before() == said


PROGRAM = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from fastbeit.engine.protocol import compiled_before
from test_compile_blocks import settings, train
losses, _ = train(settings(sys.argv[1]), num_steps=3)
counters = torch._dynamo.utils.counters["inductor"]
print(json.dumps([losses, counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"], compiled_before()]))
"""


@pytest.mark.long
def test_a_second_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With generated code: the losses of eager steps, and all graphs out of the cache in a second process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def run(compiled: str) -> tuple[list[float], int, int, str]:
        out = finished([sys.executable, "-c", PROGRAM, compiled, str(Path(__file__).parent)], check=True).stdout
        return json.loads(out.splitlines()[-1])

    eager, _, _, nothing = run("off")
    (cold, hits, misses, first), (warm, hits_again, misses_again, second) = run("on"), run("on")
    assert nothing == "" and first.startswith("; a cold start, ") and second.startswith("; a warm start, ")
    assert cold == pytest.approx(eager, rel=1e-6) and warm == cold
    assert misses > 0 and hits_again == hits + misses and misses_again == 0
