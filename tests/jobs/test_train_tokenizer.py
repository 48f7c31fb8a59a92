"""A dVAE of one's own: it says how it goes, and a resumed training is the uninterrupted one."""

import copy
import json
import math
import signal
import threading
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fastbeit.data.index.reader import Index
from fastbeit.data.index.scan import build_index
from fastbeit.engine.ranks import World
from fastbeit.errors import CHECKPOINT_UNUSABLE, DONE, PREEMPTED, USAGE, DataError, RunError
from fastbeit.jobs.train_tokenizer import DvaeTraining, step_generator, train_tokenizer
from fastbeit.tokenizer.disk import load_tokenizer
from fastbeit.tokenizer.quality import measure_quality, word_usage
from fastbeit.tokenizer.training.objective import DvaeTrainer, draw_words, gumbel_noise
from fastbeit.train.ema import Average
from fastbeit.train.log import RunLog
from helpers.dvae_training import config, crops, photo_index
from helpers.tiny import make_photos
from helpers.waiting import PATIENCE_S

COMMAND = ["fastbeit", "tokenizer", "train"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photo_index(tmp_path_factory.mktemp("photos"))


def weights(out: Path) -> bytes:
    return (out / "dvae.safetensors").read_bytes()


def test_it_speaks_from_the_start_to_the_end(photos, tmp_path, capsys, monkeypatch):
    """How far the start is, what is resumed, and what the figures are worth beside the bundled tokenizer."""
    clock = iter(range(10**9))
    monkeypatch.setattr("fastbeit.data.progress.time.perf_counter", lambda: 2.0 * next(clock))
    out, stop_at_2 = tmp_path / "dvae", config(log__save_every=2)
    see, looks = DvaeTraining.look, []

    def stop_after_the_look(self, model, log, step, stop):
        found = see(self, model, log, step, stop)
        looks.append(step)
        if len(looks) == 1:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(DvaeTraining, "look", stop_after_the_look)
    assert train_tokenizer(stop_at_2, photos, photos, out, COMMAND) == PREEMPTED
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("start: 24 words from the colours of ") and said[0].endswith("then 6 steps")
    parts = [line for line in said if "ETA" in line and line.startswith("start ")]
    assert [part for part in "12345" if any(line.startswith(f"start {part}/5") for line in parts)] == list("12345")
    assert train_tokenizer(stop_at_2, photos, photos, out, COMMAND) == DONE
    both = capsys.readouterr()
    assert "going on from the checkpoint of step 2" in both.err and "start" not in both.err.split("steps 2 to 6")[0]
    mine, beside, where = both.out.splitlines()[-3:]
    assert mine.startswith("on held-out images a pixel is off by ") and "of 24 words are in use" in mine
    assert beside.startswith("the bundled tokenizer: ") and "worse: train longer" in beside
    assert where == f"tokenizer: {out}"


def test_the_drawn_words_of_a_step_are_a_function_of_seed_and_step():
    logits = torch.zeros(1, 24, 8, 8)

    def draw(seed: int, step: int) -> list[int]:
        noise = gumbel_noise((1, 24, 8, 8), step_generator(seed, step, logits.device))
        return draw_words(logits, noise, 1.0).argmax(1).flatten().tolist()

    assert draw(0, 2) == draw(0, 2)
    assert draw(0, 2) != draw(0, 3) != draw(1, 2)


def test_a_training_whose_gradient_is_not_finite_stops(photos, tmp_path, monkeypatch):
    forward = DvaeTrainer.forward

    def broken(self, *args):
        loss, *rest = forward(self, *args)
        return loss * math.inf, *rest

    monkeypatch.setattr(DvaeTrainer, "forward", broken)
    with pytest.raises(RunError, match="not finite in the last 5 steps up to step 5"):
        train_tokenizer(config(), photos, None, tmp_path / "dvae", COMMAND)


def test_the_average_follows_the_weights():
    torch.manual_seed(0)
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def followed(step: int, decay: float) -> torch.Tensor:
        trained = copy.deepcopy(other)
        average = Average(trained, decay)
        trained.load_state_dict(model.state_dict())
        average.follow(step)
        with average.kept(lambda: pytest.fail("nothing is shared out")) as kept:
            assert kept is not trained
            return kept.get_parameter("weight").detach()

    # early steps are forgotten soon: 0.9 of the new weights
    torch.testing.assert_close(followed(0, 0.999), 0.1 * other.weight.detach() + 0.9 * model.weight.detach())
    torch.testing.assert_close(followed(10**6, 0.75), 0.75 * other.weight.detach() + 0.25 * model.weight.detach())
    assert torch.equal(followed(10**6, 0), model.weight)
    none = Average(model, None)
    none.follow(0)
    with none.kept(lambda: pytest.fail("nothing is shared out")) as kept:
        assert kept is model and none.weights() == {}


def test_held_out_images_are_measured_with_the_averaged_weights(photos, tmp_path):
    out = tmp_path / "dvae"
    train_tokenizer(config(optim__steps=20, log__save_every=10), photos, photos, out, COMMAND)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    looks = [line for line in lines if line.get("event") == "held_out"]
    assert [line["step"] for line in looks] == [10, 20]
    figures = json.loads((out / "dvae.json").read_text())["origin"]["held_out"]
    assert all(figures[key] == looks[-1][key] for key in figures) and looks[0] != looks[1]
    images = crops(photos, 48, seed=3)
    quality = measure_quality(load_tokenizer(out), [images])
    assert figures["mean_abs_error"] == pytest.approx(quality.mean_abs_error, rel=0.3)
    pictures = [path for path in (out / "tensorboard").iterdir() if b"reconstructions" in path.read_bytes()]
    assert pictures


def test_a_training_keeps_its_words_and_shows_the_photo(photos, tmp_path):
    assert train_tokenizer(config(optim__steps=90), photos, None, tmp_path / "dvae", COMMAND) == DONE
    lines = [json.loads(line) for line in (tmp_path / "dvae" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 91))
    tokenizer, images = load_tokenizer(tmp_path / "dvae"), crops(photos, 48, seed=3)
    tokens = tokenizer.encode(images)
    error = (tokenizer.decode(tokens).float() - images.float()).abs().mean() / 255
    usage = word_usage(tokenizer, [images])
    # five seeds gave 0.083 to 0.088, all 24 words, perplexity 19.9 to 21.6 (after 30 steps, when the words are still on
    # their way, 14.5 to 19.9); one colour for all gives 0.2, 1 and 1
    assert error < 0.13 and usage.num_in_use >= 18 and usage.perplexity > 12


def test_a_finished_training_is_left_as_it_is(photos, tmp_path, capsys):
    out = tmp_path / "dvae"
    train_tokenizer(config(), photos, None, out, COMMAND)
    before, log = weights(out), (out / "log.jsonl").read_text()
    assert train_tokenizer(config(), photos, None, out, COMMAND) == DONE
    assert "finished before" in capsys.readouterr().out
    assert weights(out) == before and (out / "log.jsonl").read_text() == log


def test_a_resumed_training_is_the_uninterrupted_one(photos, tmp_path, monkeypatch, capfd):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_tokenizer(config(), photos, None, whole, COMMAND)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "advance", lambda log: signal.raise_signal(signal.SIGTERM))
        for step in (1, 2):
            assert train_tokenizer(config(), photos, None, parts, COMMAND) == PREEMPTED
            assert f"stopped at step {step} of 6, saved; to go on: fastbeit tokenizer train" in capfd.readouterr().err
        assert not (parts / "dvae.json").exists()
    assert train_tokenizer(config(), photos, None, parts, COMMAND) == DONE
    assert weights(parts) == weights(whole)
    figures = [
        [{key: line[key] for key in ("step", "loss", "lr", "words_in_use")} for line in map(json.loads, text)]
        for text in ((out / "log.jsonl").read_text().splitlines() for out in (whole, parts))
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("step", ["solve_both_ends", "measure_quality"])
def test_a_stop_ends_the_start_and_the_look(photos, tmp_path, monkeypatch, capfd, step):
    """Both take long on many images."""

    def stopped(*args):
        signal.raise_signal(signal.SIGTERM)
        assert not threading.Event().wait(PATIENCE_S), "waited on"

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_tokenizer(config(optim__steps=2), photos, photos, whole, COMMAND)
    with monkeypatch.context() as patch:
        patch.setattr(f"fastbeit.jobs.train_tokenizer.{step}", stopped)
        assert train_tokenizer(config(optim__steps=2), photos, photos, parts, COMMAND) == PREEMPTED
        where = "before the first step" if step == "solve_both_ends" else "at step 2 of 2, saved"
        assert f"stopped {where}; to go on: fastbeit tokenizer train" in capfd.readouterr().err
    assert not (parts / "dvae.json").exists()
    assert train_tokenizer(config(optim__steps=2), photos, photos, parts, COMMAND) == DONE
    assert weights(parts) == weights(whole)


def test_a_stop_while_it_is_judged_at_the_end_says_how_to_go_on(photos, tmp_path, monkeypatch, capfd):
    out = tmp_path / "dvae"
    with monkeypatch.context() as patch:
        patch.setattr(DvaeTraining, "judge_bundled", lambda self: signal.raise_signal(signal.SIGTERM))
        assert train_tokenizer(config(optim__steps=2), photos, photos, out, COMMAND) == PREEMPTED
    assert "to go on: fastbeit tokenizer train" in capfd.readouterr().err
    assert train_tokenizer(config(optim__steps=2), photos, photos, out, COMMAND) == DONE


def test_a_disk_that_vanishes_costs_no_step(photos, tmp_path, monkeypatch):
    whole, parts, images = tmp_path / "whole", tmp_path / "parts", photos.parent / "images"
    train_tokenizer(config(), photos, None, whole, COMMAND)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "advance", lambda log: images.rename(tmp_path / "unmounted"))
        with pytest.raises(RunError, match="gone, or not mounted") as caught:
            train_tokenizer(config(), photos, None, parts, COMMAND)
    assert caught.value.exit_code == 66
    (tmp_path / "unmounted").rename(images)
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["step-000001"]
    assert train_tokenizer(config(), photos, None, parts, COMMAND) == DONE
    assert weights(parts) == weights(whole)


def test_a_tokenizer_that_a_kill_has_left_half_is_written_again(photos, tmp_path):
    train_tokenizer(config(optim__steps=2), photos, None, tmp_path / "dvae", COMMAND)
    whole = weights(tmp_path / "dvae")
    for name, content in ("dvae.json", b""), ("dvae.safetensors", whole[:1000]):
        (tmp_path / "dvae" / name).write_bytes(content)
        assert train_tokenizer(config(optim__steps=2), photos, None, tmp_path / "dvae", COMMAND) == DONE
        assert weights(tmp_path / "dvae") == whole and load_tokenizer(tmp_path / "dvae")


def test_a_refused_start_leaves_no_trace(photos, tmp_path, monkeypatch):
    """Also where no image can be read for the first weights."""
    out = tmp_path / "deep/dvae"
    with pytest.raises(DataError):
        train_tokenizer(config(), photos, tmp_path / "nowhere.idx", out, COMMAND)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "read_bytes", lambda self, row: b"")
        with pytest.raises(DataError, match="none of the 12 images is valid"):
            train_tokenizer(config(), photos, None, out, COMMAND)
    assert not list(tmp_path.iterdir())


def test_two_seeds_are_two_tokenizers(photos, tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("two", 1)):
        train_tokenizer(config(seed=seed, optim__steps=2), photos, None, tmp_path / name, COMMAND)
    assert weights(tmp_path / "one") == weights(tmp_path / "same") != weights(tmp_path / "two")


def test_another_training_in_the_same_place_is_refused(photos, tmp_path):
    out = tmp_path / "dvae"
    train_tokenizer(config(), photos, None, out, COMMAND)
    with pytest.raises(RunError, match="vocab_size was 24, now 25") as err:
        train_tokenizer(config(model__vocab_size=25), photos, None, out, COMMAND)
    assert err.value.exit_code == USAGE
    build_index(make_photos(tmp_path / "fewer", 8), tmp_path / "fewer.idx")
    with pytest.raises(RunError, match="made with another index") as err:
        train_tokenizer(config(), tmp_path / "fewer.idx", None, out, COMMAND)
    assert err.value.exit_code == CHECKPOINT_UNUSABLE


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__image_size": 60}, "multiples of 8; got 60; try 64"),
        ({"objective__temperature": [0.1, 1.0]}, "start >= end"),
        ({"data__crop_scale": [1.0, 0.2]}, "crop_scale wants a range"),
        ({"model__n_hid": 10}, "multiple of 4"),
        ({"engine__compile": True}, "engine.compile=on is for pre-training"),
        ({"engine__checkpoint_blocks": True}, "engine.checkpoint_blocks=true is for pre-training"),
        ({"optim__steps": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_a_batch_that_does_not_divide_leaves_no_trace(photos, tmp_path, monkeypatch):
    """Else the corrected command would find another run."""
    monkeypatch.setattr("fastbeit.jobs.train_tokenizer.start_world", lambda _: World(0, 3, torch.device("cpu")))
    with pytest.raises(RunError, match="8 is not a multiple of 3 ranks x 1 micro-batches; try 9"):
        train_tokenizer(config(optim__batch_size=8), photos, None, tmp_path / "dvae", COMMAND)
    assert not (tmp_path / "dvae").exists()
