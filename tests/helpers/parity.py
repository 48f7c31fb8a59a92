"""One engine on the ranks of a launcher: gradients of its first step and losses of ten, in each way of taking a step.

    torchrun ... -m helpers.parity ENGINE FILE        # ENGINE: ddp, or the number of a ZeRO stage

`run` in one process without a launcher, engine single, gives what the others are compared with.
"""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbeit.config.running import EngineConfig, Kernels
from fastbeit.config.sections import ModelConfig, OptimConfig
from fastbeit.engine.protocol import make_engine
from fastbeit.engine.ranks import World, start_world
from fastbeit.engine.sharded import is_sharded, load_state, shares_weights
from fastbeit.engine.streamed import in_order, read
from fastbeit.engine.zero import building
from fastbeit.model.beit import Beit
from fastbeit.process import leave
from fastbeit.train.loop import micro_batches
from fastbeit.train.optim import make_optimizer

SIZES = ModelConfig(width=32, depth=3, num_heads=2, mlp_width=64, patch_size=(8, 8), drop_path=0)
NUM_IMAGES, SLOTS = 12, 6  # whole micro-batches on 1, 2 and 3 ranks
NUM_STEPS, NUM_BATCHES = 10, 3  # the last step has the batch of the first
VOCAB = 35  # neither even nor a multiple of 3: the last part of what ranks share out is shorter
POISONED, GIVEN_BACK = 3, 6  # steps
WAYS = [*itertools.product(("fp32", "bf16"), (1, 2), (False, True))]  # precision, micro-batches, checkpointed blocks


class TwoHeaded(Beit):
    """The head is used twice in a forward, as no model of ours does; the bias table is shared by all blocks."""

    def forward(
        self, images: Tensor, masked: Tensor, predict_idx: Tensor, targets: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self._features(images, masked, predict_idx, keep)
        (one, right), (other, _) = self.lm_head(x, targets), self.lm_head(0.5 * x, targets.flip(1))
        return one + other, right


def make_model(checkpoint_blocks: bool) -> TwoHeaded:
    half = (0.5, 0.5, 0.5)
    reference = Kernels("sdpa", "reference", "reference", "reference")
    return TwoHeaded(
        SIZES,
        image_size=(32, 32),
        num_outputs=VOCAB,
        mean=half,
        std=half,
        kernels=reference,
        checkpoint_blocks=checkpoint_blocks,
    )


def weights() -> dict[str, Tensor]:
    """All of them random: what starts at 0 or 1 hides errors."""
    torch.manual_seed(0)
    state = make_model(False).state_dict()
    random = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(one.shape, generator=random) for name, one in state.items() if one.is_floating_point()}
    return {name: one + 0.1 * noise[name] if name in noise else one for name, one in state.items()}


def batch(number: int) -> tuple[Tensor, ...]:
    """Images with other numbers of labels each, so that ranks and micro-batches have other shares of the loss."""
    random = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=torch.uint8, generator=random)
    slots = torch.stack([torch.randperm(16, generator=random)[:SLOTS] for _ in range(NUM_IMAGES)])
    targets = torch.randint(0, VOCAB, (NUM_IMAGES, SLOTS), generator=random)
    unused = torch.arange(SLOTS) >= torch.randint(1, SLOTS + 1, (NUM_IMAGES, 1), generator=random)
    targets = targets.masked_fill(unused, -100)
    masked = torch.zeros(NUM_IMAGES, 16, dtype=torch.bool).scatter_(1, slots, True)
    return images, masked, slots, targets


def run(settings: EngineConfig, accumulate: int, world: World) -> tuple[dict[str, Tensor], list[float]]:
    """Gradients of the first step by name, whole, as means over the global batch; the loss of each step."""
    optim = OptimConfig(batch_size=NUM_IMAGES, accumulate=accumulate, lr=1e-3, clip_grad=1.0)
    with building(settings, world):
        model = make_model(settings.checkpoint_blocks)
    if shares_weights(settings):
        # no rank has had more than a module whole
        assert all(is_sharded(parameter) and not parameter.numel() for parameter in model.parameters())
    load_state(model, weights())
    optimizer = make_optimizer(model, optim)
    engine = make_engine(settings, optim, model, optimizer, world, accumulate)
    if shares_weights(settings):
        parameters: list[Any] = list(model.parameters())
        # of parameters shared out, vectors stay whole between steps where `settings_of` asks for it
        assert {p.ds_persist for p in parameters} == ({False} if accumulate == 1 else {False, True})
    gradients, losses = {}, []
    share = slice(world.rank * NUM_IMAGES // world.size, (world.rank + 1) * NUM_IMAGES // world.size)

    def accumulate_all(tensors: tuple[Tensor, ...], count: Tensor) -> Tensor:
        own, total = tuple(tensor[share] for tensor in tensors), torch.zeros(())
        for part, is_last in micro_batches(own, accumulate):
            total += engine.accumulate(part, count, is_last)[0].float()
        return world.add(total) / count

    for step in range(NUM_STEPS):
        tensors = batch(step % NUM_BATCHES)
        count = (tensors[3] != -100).sum()
        if step == POISONED:
            # infinite gradients on one rank: all skip the step
            accumulate_all(tensors, count if world.rank < world.size - 1 else torch.zeros(()))
            assert not math.isfinite(engine.step())
        if step == GIVEN_BACK:
            # what the optimizer remembers is read, wiped and given back
            state = {name: read(tensor) for name, tensor in in_order(engine.optimizer_state())}
            engine.load_optimizer_state({name: torch.zeros_like(tensor) for name, tensor in state.items()})
            engine.load_optimizer_state(state)
        losses.append(accumulate_all(tensors, count).item())
        if not step:
            gradients = {name: _gradient(parameter) for name, parameter in model.named_parameters()}
        assert math.isfinite(engine.step())
    return gradients, losses


def _gradient(parameter: nn.Parameter) -> Tensor:
    if is_sharded(parameter) or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        found = safe_get_full_grad(parameter)
    else:
        found = parameter.grad
    assert found is not None
    return found.detach().float().cpu().clone()


def settings_of(engine: str, precision: str, accumulate: int, checkpoint_blocks: bool) -> EngineConfig:
    zero = {"name": "deepspeed", "zero_stage": int(engine)} if engine.isdecimal() else {"name": engine}
    if engine == "3":
        # by themselves all tensors of so small a model would stay whole; here none does, or only vectors
        kept = "nothing" if accumulate == 1 else "vectors"
        zero["deepspeed_config"] = str(Path(__file__).with_name(f"parity_zero3_{kept}.json"))
    common = {"device": "cpu", "precision": precision, "checkpoint_blocks": checkpoint_blocks}
    return EngineConfig.model_validate(zero | common)


def run_all(engine: str, world: World) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Gradients and losses of each way, by `WAY/NAME` and by way."""
    gradients, losses = {}, {}
    for way in WAYS:
        _, accumulate, _ = way
        name = "-".join(map(str, way))
        found, losses[name] = run(settings_of(engine, *way), accumulate, world)
        gradients |= {f"{name}/{key}": value for key, value in found.items()}
    return gradients, losses


def main() -> None:
    engine, path = sys.argv[1:]
    # as torchrun has it where there are several ranks
    torch.set_num_threads(1)
    world = start_world(settings_of(engine, *WAYS[0]))
    gradients, losses = run_all(engine, world)
    if world.rank == 0:
        save_file(gradients, path)
        Path(path).with_suffix(".json").write_text(json.dumps(losses))
    world.leave()
    leave(0)


if __name__ == "__main__":
    main()
