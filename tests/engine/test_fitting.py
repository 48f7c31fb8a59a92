"""How micro-batches are chosen: by the formula, then by a dry step that leaves no trace; alike on all ranks."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbeit.config.running import EngineConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.engine.fitting import (
    Rehearsal,
    bytes_on,
    dry_step,
    fitting_accumulate,
    next_count,
    out_of_memory_in_one_line,
    remedy,
    search,
)
from fastbeit.engine.memory import Footprint
from fastbeit.engine.ranks import World
from fastbeit.errors import RunError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
ENGINE = EngineConfig(precision="fp32")


def footprint_of(per_image: int = 10, static: int = 100) -> Footprint:
    return Footprint(0, 0, static, 0, 0, saved=per_image, temporary=0)


@dataclass(frozen=True)
class Pair(World):
    """Rank 0 of two, and what rank 1 says each time."""

    others: list[Any] = field(default_factory=list)

    def gather(self, items: list) -> list:
        return [*items, self.others.pop(0)]


class Step:
    """A dry step that has room for so many images; `tried` are those it was asked for."""

    def __init__(self, most: int) -> None:
        self.most, self.tried = most, []

    def __call__(self, num_images: int) -> int | None:
        self.tried.append(num_images)
        return num_images if num_images <= self.most else None


# images of a rank, bytes there are, images that a dry step has room for: the micro-batches, and what is tried for them
@pytest.mark.parametrize(
    "images, room, most, count, tried",
    [
        (256, 100 + 2560, 256, 1, [256]),
        (256, 100 + 2559, 256, 2, [128]),
        (256, 100 + 2560, 100, 4, [256, 128, 64]),  # the formula said too little
        (96, 100 + 330, 96, 3, [32]),  # no power of two: the divisor next below
        (96, 100 + 330, 15, 12, [32, 16, 8]),
        (7, 100 + 30, 7, 7, [1]),  # a prime has no other
        (8, 50, 8, 8, [1]),  # the formula has no room even for one; what counts is the dry step
    ],
)
def test_the_least_that_fits(images, room, most, count, tried):
    step = Step(most)
    found = search(images, footprint_of(), room, step, World(0, 1, CPU))
    assert found == (count, images // count) and step.tried == tried


def test_not_even_one_image_fits():
    step = Step(0)
    assert search(4, footprint_of(), 10**6, step, World(0, 1, CPU)) == (4, None)
    assert step.tried == [4, 2, 1]


def test_the_smallest_card_decides():
    # rank 1 wants 4 micro-batches where this one wants 2; then it fails in one of 16 images, and not in one of 8
    step = Step(64)
    world = Pair(0, 2, CPU, others=[4, None, 11])
    assert search(64, footprint_of(), 100 + 320, step, world) == (8, 11)
    assert step.tried == [16, 8]


def test_the_next_count_divides_and_is_at_least_twice():
    assert [next_count(12, count) for count in (1, 2, 3, 4, 6)] == [2, 4, 6, 12, 12]


class Toy(nn.Module):
    """Says that memory ran out with more than `most` images, after it has allocated something."""

    def __init__(self, most: int = 8) -> None:
        super().__init__()
        self.most = most
        self.linear = nn.Linear(4, 4)
        self.seen = nn.Buffer(torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.linear(x).square().sum()
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee the documentation")
        return loss, torch.zeros(())


REHEARSAL = Rehearsal(footprint_of(), lambda num_images: (torch.ones(num_images, 4),))


@pytest.mark.parametrize("most, fits", [(8, True), (4, False)])
def test_a_dry_step_leaves_no_trace(most, fits):
    model = Toy(most)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert (dry_step(model, REHEARSAL, 8, torch.float32) is not None) == fits
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random) and not torch.is_autocast_enabled("cpu")


@pytest.fixture
def card(monkeypatch):
    """A card of 40 GiB with as many bytes free as is said, where there is none."""

    def card(free: int, total: int = 40 * GIB) -> World:
        properties = type("Properties", (), {"total_memory": total})
        for name, answer in {
            "mem_get_info": (free, total),
            "memory_reserved": 0,
            "memory_allocated": 0,
            "empty_cache": None,
            "get_device_properties": properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        return World(0, 1, CUDA)

    return card


def fit(world: World, model: nn.Module, kept=None, engine=ENGINE, per_image=GIB, **optim: Any):
    rehearsal = Rehearsal(footprint_of(per_image), lambda num_images: (torch.ones(num_images, 4),))
    settings = OptimConfig.model_validate({"batch_size": 64} | optim)
    return fitting_accumulate(settings, engine, rehearsal, model, world, kept)


def test_a_number_is_taken_and_a_cpu_takes_one(card):
    """No dry step: the model would run out of memory in one."""
    assert fit(card(40 * GIB), Toy(0), accumulate=4).accumulate == 4
    assert fit(World(0, 1, CPU), Toy(0)).accumulate == 1
    assert fit(World(0, 1, CPU), Toy(0), accumulate=4).accumulate == 4
    no_micro_batches = fitting_accumulate(OptimConfig(accumulate=1), ENGINE, None, Toy(0), World(0, 1, CPU), None)
    assert no_micro_batches.accumulate == 1 and not no_micro_batches.line and no_micro_batches.kept is None


def test_auto_keeps_a_reserve_and_says_what_it_found(card):
    # 2 of 40 GiB stay free: 34 are enough for 32 images of 1 GiB, 33 are not
    found = fit(card(35 * GIB), Toy(64))
    assert found.accumulate == 2 and found.figures["predicted_mib"] == pytest.approx(32 * 1024, rel=1e-3)
    assert found.line.startswith(
        "optim.accumulate=auto: 2 micro-batches a step of 32 images a rank: the largest that fits into 33.0 GiB; "
        "peak predicted 32.0 GiB, in a dry step "
    )
    assert "checkpoint_blocks" not in found.line and "\n" not in found.line
    assert fit(card(34 * GIB - 1), Toy(64)).accumulate == 4


def test_an_average_of_the_weights_is_there_already(card):
    """So what is free is without it, and it is not counted again."""
    rehearsal = Rehearsal(replace(footprint_of(GIB), average=9 * GIB), lambda num_images: (torch.ones(num_images, 4),))
    found = fitting_accumulate(OptimConfig(batch_size=64), ENGINE, rehearsal, Toy(64), card(35 * GIB), None)
    assert found.accumulate == 2 and found.figures["predicted_mib"] == pytest.approx(32 * 1024, rel=1e-3)


def test_weights_in_the_hosts_memory_make_no_room_on_the_card(card):
    model = Toy()
    assert bytes_on(CPU, model) == (4 * 4 + 4 + 3) * 4 and bytes_on(CUDA, model) == 0
    for name, value in {"ds_id": 0, "ds_tensor": torch.empty(3 * GIB, dtype=torch.uint8)}.items():
        setattr(model.linear.weight, name, value)
    engine = EngineConfig(precision="fp32", name="deepspeed", zero_stage=3, offload="weights")
    assert "of 33.0 GiB" in fit(card(35 * GIB), model, engine=engine).line


def test_small_micro_batches_have_a_hint(card):
    assert "engine.checkpoint_blocks=true makes room" in fit(card(20 * GIB), Toy(64)).line
    recomputed = EngineConfig(precision="fp32", checkpoint_blocks=True)
    assert "checkpoint_blocks" not in fit(card(20 * GIB), Toy(64), engine=recomputed).line


def test_a_choice_is_kept_on_the_same_card_and_made_anew_on_another(card):
    kept = fit(card(35 * GIB), Toy(16)).kept
    assert kept is not None and kept["accumulate"] == 4
    again = fit(card(39 * GIB), Toy(0), kept=kept)  # no dry step
    assert again.accumulate == 4 and again.kept == kept and again.line.endswith(", as before")
    other = fit(card(79 * GIB, total=80 * GIB), Toy(64), kept=kept)
    assert other.accumulate == 1 and "chosen anew, for card_mib was 40960, now 81920" in other.line
    changed = fit(card(39 * GIB), Toy(64), kept=kept, engine=EngineConfig(precision="bf16"))
    assert changed.accumulate == 2 and "precision was float32, now bfloat16" in changed.line
    stages = [EngineConfig(precision="fp32", name="deepspeed", zero_stage=stage) for stage in (1, 2)]
    shared = fit(card(39 * GIB), Toy(64), engine=stages[0]).kept
    further = fit(card(39 * GIB), Toy(64), kept=shared, engine=stages[1])
    assert further.line.endswith("deepspeed was ZeRO-1, now ZeRO-2")


def test_a_card_without_room_is_said_in_one_line(card):
    with pytest.raises(RunError, match="with one image: 38.0 GiB free.*lower optim.batch_size, now 64") as caught:
        fit(card(40 * GIB), Toy(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "accumulate, in_micro_batches, wanted",
    [
        (1, True, "set optim.accumulate=2, now 1"),
        (4, True, "set optim.accumulate=8, now 4"),
        (8, True, "lower optim.batch_size, now 16; engine.checkpoint_blocks=true makes room"),
        (1, False, "lower optim.batch_size, now 16"),
    ],
)
def test_out_of_memory_names_the_key(accumulate, in_micro_batches, wanted):
    hint = remedy(8, accumulate, OptimConfig(batch_size=16), ENGINE, in_micro_batches)
    with pytest.raises(RunError) as caught, out_of_memory_in_one_line(hint):
        Toy(0)(torch.ones(1, 4))
    assert wanted in str(caught.value) and caught.value.exit_code == 1
    assert "(CUDA out of memory. Tried to allocate 20.00 MiB.)" in str(caught.value) and "\n" not in str(caught.value)
