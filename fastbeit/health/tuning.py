"""Times what a run could take: a block by each attention, and the head with its loss, at the shapes of a step.

Forward and backward, compiled as in a run; the choices of a setting take turns, and medians count. It runs in a process
of its own, as `apart.py` has it: where that one ends or hangs, what was timed before is left.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbeit.config.pretrain import Config
from fastbeit.config.running import Kernels
from fastbeit.engine.protocol import compiles, compute_dtype
from fastbeit.health.apart import answers_apart
from fastbeit.health.finding import told
from fastbeit.health.operators import SMALL_WORDS, smaller
from fastbeit.model.attention import BIAS_ALIGNMENT
from fastbeit.model.beit import Head
from fastbeit.model.trials import random_numbers
from fastbeit.model.tuned import TUNED, Choices, micro_batch
from fastbeit.model.vit import INIT_STD, Block
from fastbeit_kernels.relative_attention import WORKSPACE_BYTES

ADVANTAGE = 0.03  # that a choice must have over the default, which is what has been run most
ATTENTIONS = "triton", "xformers", "sdpa"
WORKSPACES_MIB = 128, 64, 32
ROWS = 9600, 4096, 2048, 1024
ROUNDS = {"cuda": 30, "cpu": 3}
FEW_IMAGES = 2  # for the interpreter
SLEEP = 20_000_000  # clock cycles of a GPU, 6 ms at least, in which the host enqueues what is timed after them
PATIENCE_S = 600

Work = Callable[[], object]
Clock = Callable[[Work], float]  # milliseconds


@dataclass(frozen=True)
class Timing:
    """A choice of a setting of `kernels`."""

    setting: str
    choice: Any  # None: the operator's own
    ms: float | None  # median; None: it does not run
    why: str = ""  # what it raised


@dataclass(frozen=True)
class Question:
    """The choices of a setting, and how the work of one is made."""

    setting: str
    choices: tuple[Any, ...]
    make: Callable[[Any], Work]


def tune(config: Config, num_outputs: int, num_ranks: int, device: torch.device, right: list[str]) -> list[Timing]:
    """In another process.

    Args:
        right: implementations that run here and are right, as "attention triton".

    Returns:
        What was timed until the process ended; where it did not end well, the last one has no setting and says why.
    """
    asked: dict[str, Any] = dict(config=config.model_dump(mode="json"), device=str(device), right=right)
    asked |= dict(num_outputs=num_outputs, num_ranks=num_ranks)
    found, why = answers_apart("fastbeit.health.tuning", asked, device, PATIENCE_S)
    return [*(Timing(**one) for one in found), *([Timing("", None, None, why)] if why else [])]


def timings(
    config: Config, num_outputs: int, num_ranks: int, device: torch.device, right: list[str], clock: Clock | None = None
) -> Iterator[Timing]:
    """Of each question in turn, in this process."""
    clock = clock or (cuda_ms if device.type == "cuda" else host_ms)
    for question in questions(config, num_outputs, num_ranks, device, right):
        yield from ask(question, clock, ROUNDS[device.type])
        torch._dynamo.reset()  # it keeps no more than a few versions of a block
        if device.type == "cuda":
            torch.cuda.empty_cache()


def questions(
    config: Config, num_outputs: int, num_ranks: int, device: torch.device, right: list[str]
) -> Iterator[Question]:
    """Without a card small, as the doctor interprets kernels."""
    images = micro_batch(config, num_outputs, num_ranks, device)
    if device.type != "cuda":
        config, num_outputs, images = smaller(config), min(num_outputs, SMALL_WORDS), FEW_IMAGES
    step = _Step(config, num_outputs, images, device)
    attentions = tuple(name for name in ATTENTIONS if f"attention {name}" in right)
    yield Question("attention", attentions, lambda name: step.block(Kernels(attention=name)))
    if "triton" in attentions:
        whole = images * config.model.num_heads * (config.num_patches + 1) ** 2 * step.dtype.itemsize
        smaller_ones = tuple(mib for mib in WORKSPACES_MIB if mib * 2**20 < min(whole, WORKSPACE_BYTES))
        parts = (None, *smaller_ones)
        yield Question("attention_mib", parts, lambda mib: step.block(Kernels("triton", attention_mib=mib)))
    if config.objective == "tokens":
        loss = "triton" if "loss triton" in right else "reference"
        num_rows = images * config.num_slots
        rows = (None, num_rows, *(n for n in ROWS if n < num_rows))
        yield Question("loss_rows", rows, lambda n: step.head(Kernels(loss=loss, loss_rows=n)))


def ask(question: Question, clock: Clock, rounds: int) -> list[Timing]:
    """Whatever a choice raises, the others are timed."""
    works: dict[Any, Work] = {}
    failed: list[Timing] = []
    for choice in question.choices:
        try:
            works[choice] = question.make(choice)
            works[choice]()  # compiles
            works[choice]()
        except Exception as err:
            works.pop(choice, None)
            failed.append(Timing(question.setting, choice, None, told(err)))
    times: dict[Any, list[float]] = {choice: [] for choice in works}
    for number in range(rounds):
        for choice in random.Random(number).sample(list(works), len(works)):
            times[choice].append(clock(works[choice]))
    return [*(Timing(question.setting, choice, median(ms)) for choice, ms in times.items()), *failed]


def chosen(found: list[Timing], default_attention: str) -> Choices:
    """The fastest of each setting, where it is faster than the default by `ADVANTAGE`; a setting that was not asked
    about, or whose default does not run, stays as it is."""
    choices: Choices = dict.fromkeys(TUNED)
    for setting in TUNED:
        ms = {one.choice: one.ms for one in found if one.setting == setting and one.ms is not None}
        default = default_attention if setting == "attention" else None
        if default in ms:
            best = min(ms, key=ms.__getitem__)
            choices[setting] = best if ms[default] >= (1 + ADVANTAGE) * ms[best] else default
    return choices


@dataclass(frozen=True)
class _Step:
    """What a step of a run gives its blocks and its head, in random numbers."""

    config: Config
    num_outputs: int
    images: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.config.engine, self.device)

    @property
    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def block(self, kernels: Kernels) -> Work:
        config, model, S = self.config, self.config.model, self.config.num_patches + 1
        block = Block(model, config.grid if model.relative_position == "per_block" else None, kernels)
        self._fill(block)
        if compiles(config.engine, self.device):
            block.compile_whole()
        leaves, bias = [self._random(self.images, S, model.width)], None
        if model.relative_position == "shared":
            bias = self._random(model.num_heads, S, -(-S // BIAS_ALIGNMENT) * BIAS_ALIGNMENT)
            leaves.append(bias)
        keep = torch.ones(2, self.images, device=self.device)
        run = block
        if config.engine.checkpoint_blocks:
            run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        return partial(self._both, run, (leaves[0], bias, keep), [*leaves, *block.parameters()])

    def head(self, kernels: Kernels) -> Work:
        config = self.config
        head = Head(config.model.width, self.num_outputs, kernels.loss, kernels.loss_rows)
        self._fill(head)
        nn.init.zeros_(head.bias)
        x = self._random(self.images, config.num_slots, config.model.width)
        labels = torch.arange(x[..., 0].numel(), device=self.device).view(x.shape[:2]) % self.num_outputs
        return partial(self._both, lambda *inputs: head(*inputs)[0], (x, labels), [x, *head.parameters()])

    def _fill(self, module: nn.Module) -> None:
        """Weights as they may be in training: a card's clock hangs on its numbers."""
        for parameter in module.to(self.device).parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=INIT_STD)

    def _both(self, run: Callable, inputs: tuple, leaves: list[Tensor]) -> None:
        with self.autocast:
            out = run(*inputs)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    def _random(self, *shape: int) -> Tensor:
        return random_numbers(self.device, len(shape), *shape).requires_grad_()


def cuda_ms(work: Work) -> float:
    """Of the card alone."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_ms(work: Work) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def main(answers: Path) -> None:
    """The process: what is asked on stdin, a timing a line into `answers`."""
    asked: dict[str, Any] = json.load(sys.stdin)
    asked |= dict(config=Config.model_validate(asked["config"]), device=torch.device(asked["device"]))
    for found in timings(**asked):
        with answers.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
