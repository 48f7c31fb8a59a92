"""What is timed, in whose turn, and which choice is taken: with a clock of the test's own."""

from typing import Any

import pytest
import torch

from fastbeit.config.pretrain import Config
from fastbeit.health import tuning
from fastbeit.health.tuning import Question, Timing, ask, chosen, questions, timings, tune
from fastbeit.jobs import doctor as module
from fastbeit.jobs.doctor import doctor
from fastbeit.model.tuned import key_of, look_up, table_path
from fastbeit_kernels.backend import INTERPRETED
from helpers.tiny import SETTINGS

CPU = torch.device("cpu")
CONFIG = Config.model_validate(SETTINGS)
RIGHT = ["attention triton", "attention sdpa", "attention eager", "loss triton", "loss reference"]


# ---- which choice is taken


@pytest.mark.parametrize(
    "default_ms, taken",
    [(102.9, "triton"), (103.1, "sdpa"), (100.0, "triton"), (90.0, "triton")],
    ids=["2.9 % is too little", "3.1 % is enough", "as fast", "slower"],
)
def test_a_choice_wants_three_percent_over_the_default(default_ms: float, taken: str):
    found = [Timing("attention", "triton", default_ms), Timing("attention", "sdpa", 100.0)]
    assert chosen(found, "triton") == dict(attention=taken, attention_mib=None, loss_rows=None)


@pytest.mark.parametrize("ms, taken", [(97.2, None), (96.9, 4096)])
def test_a_number_wants_it_too_and_the_fastest_is_taken(ms: float, taken: int | None):
    found = [Timing("loss_rows", None, 100.0), Timing("loss_rows", 4096, ms), Timing("loss_rows", 1024, ms + 1)]
    assert chosen(found, "sdpa")["loss_rows"] == taken


def test_without_a_time_of_the_default_all_stays_as_it_is():
    found = [Timing("attention", "triton", None, "it broke"), Timing("attention", "sdpa", 1.0)]
    assert chosen(found, "triton") == dict.fromkeys(("attention", "attention_mib", "loss_rows"))


# ---- how it is timed


def test_choices_take_turns_and_medians_count():
    order: list[str] = []
    times = dict(a=iter([3.0, 900.0, 1.0, 2.0, 2.5]), b=iter([1.0] * 5))

    def clock(work: Any) -> float:
        work()
        return next(times[order[-1]])

    found = ask(Question("loss_rows", ("a", "b"), lambda name: lambda: order.append(name)), clock, rounds=5)
    assert found == [Timing("loss_rows", "a", 2.5), Timing("loss_rows", "b", 1.0)]
    timed = order[4:]  # both were run twice before
    assert all(sorted(timed[i : i + 2]) == ["a", "b"] for i in range(0, 10, 2)) and len(timed) == 10
    assert timed.index("a") != timed[2:].index("a") or timed != ["a", "b"] * 5


def test_what_a_choice_raises_is_told_and_the_others_are_timed():
    def make(choice: int) -> Any:
        if choice == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    found = ask(Question("loss_rows", (1, 2, 3), make), lambda work: 1.0, rounds=1)
    assert [(one.choice, one.ms) for one in found] == [(1, 1.0), (3, 1.0), (2, None)]
    assert found[-1].why == "OutOfMemoryError: CUDA out of memory"


@pytest.mark.skipif(not INTERPRETED, reason="interprets the kernels")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(model=SETTINGS["model"] | dict(relative_position="per_block"), engine=dict(checkpoint_blocks=True)),
        dict(model=SETTINGS["model"] | dict(relative_position="none"), objective="pixels"),
    ],
    ids=["shared", "per block, recomputed", "no bias, pixels"],
)
def test_blocks_and_heads_run_by_each_choice(settings: dict, monkeypatch: pytest.MonkeyPatch):
    """In small, by the interpreter; 9 patches, of which 4 are predicted, of two images."""
    monkeypatch.setitem(tuning.ROUNDS, "cpu", 1)
    config = Config.model_validate(SETTINGS | settings)
    # a head of BEiT's width, which Triton takes
    config = config.model_copy(update=dict(model=config.model.model_copy(update=dict(num_heads=2))))
    found = list(timings(config, 32, 1, CPU, RIGHT, clock=lambda work: (work(), 2.0)[1]))
    assert not [one for one in found if one.ms is None], found
    wanted = [("attention", "triton"), ("attention", "sdpa"), ("attention_mib", None)]
    wanted += [("loss_rows", None), ("loss_rows", 8)] if config.objective == "tokens" else []
    assert [(one.setting, one.choice) for one in found] == wanted


def test_on_a_card_the_choices_are_those_of_its_shapes(monkeypatch: pytest.MonkeyPatch):
    """256 images of BEiT-B: 228 MiB of scores, and 19,200 rows."""
    monkeypatch.setattr(tuning, "micro_batch", lambda *_: 256)
    cuda = torch.device("cuda", 0)
    config = Config.model_validate(dict(engine=dict(precision="bf16")))
    found = {one.setting: one.choices for one in questions(config, 8192, 8, cuda, [*RIGHT, "attention xformers"])}
    assert found == dict(
        attention=("triton", "xformers", "sdpa"),
        attention_mib=(None, 128, 64, 32),
        loss_rows=(None, 19_200, 9600, 4096, 2048, 1024),
    )
    found = {one.setting: one.choices for one in questions(config, 8192, 8, cuda, ["attention sdpa"])}
    assert found["attention"] == ("sdpa",) and "attention_mib" not in found


def test_a_process_that_ends_leaves_what_it_had(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "answers_apart", lambda *_: ([dict(setting="a", choice=1, ms=2.0)], "it ended"))
    assert tune(CONFIG, 32, 1, CPU, RIGHT) == [Timing("a", 1, 2.0), Timing("", None, None, "it ended")]


# ---- the command


@pytest.fixture
def cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "look_at_all", lambda *args: [])
    return tmp_path


FOUND = [Timing("attention", "triton", 4.0), Timing("attention", "sdpa", 5.0), Timing("loss_rows", None, 2.0)]
FOUND += [
    Timing("loss_rows", 4096, 1.5),
    Timing("attention", "xformers", None, "no kernel"),
    Timing("", None, None, "x"),
]


def test_on_a_card_the_table_is_written_and_said(cache, monkeypatch: pytest.MonkeyPatch, capsys):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(module, "tune", lambda *_: FOUND)
    monkeypatch.setattr(module, "_device", lambda config: cuda)
    monkeypatch.setattr(module, "cards", list)
    monkeypatch.setattr(module, "_default_attention", lambda *_: "triton")
    monkeypatch.setattr(
        module, "key_of", lambda config, num_outputs, num_ranks, device: dict(device="card", n=num_ranks)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert doctor(CONFIG, 32, cache / "found.json", tunes=True) == 0
    choices = dict(attention="triton", attention_mib=None, loss_rows=4096)
    assert look_up(table_path(), dict(device="card", n=4)).choices == choices
    said = capsys.readouterr().out
    assert "tuning for device card, n 4" in said and f"kept in '{table_path()}'" in said
    rows = [line for line in said.splitlines() if line.startswith(("kernels.", "tuning "))][1:]
    assert [" ".join(row.split()) for row in rows] == [
        "kernels.attention=triton runs 4.000 ms the default, chosen",
        "kernels.attention=sdpa runs 5.000 ms",
        "kernels.loss_rows=null runs 2.000 ms the default",
        "kernels.loss_rows=4096 runs 1.500 ms chosen",
        "kernels.attention=xformers DOES NOT RUN no kernel",
        "tuning DOES NOT RUN x; what was not timed stays as it is",
    ]
    assert '"kernels.loss_rows=4096"' in (cache / "found.json").read_text()


def test_on_a_cpu_nothing_is_kept(cache, monkeypatch: pytest.MonkeyPatch, capsys):
    """Times that would decide on a card."""
    monkeypatch.setattr(module, "tune", lambda *_: FOUND)
    config = CONFIG.model_copy(update=dict(engine=CONFIG.engine.model_copy(update=dict(device="cpu"))))
    assert doctor(config, 32, None, tunes=True) == 0
    assert "decide nothing: nothing is kept" in capsys.readouterr().out
    assert not table_path().exists() and not look_up(table_path(), key_of(config, 32, 1, CPU)).choices
