"""The page of a run: what it shows is what the run did, and it needs nothing but itself."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastbeit.config.read import load_config
from fastbeit.config.tokenizer import Architecture
from fastbeit.data.index.scan import build_index
from fastbeit.errors import RunError
from fastbeit.evaluate import finished_run
from fastbeit.evaluate.attention import Reference
from fastbeit.evaluate.finished_run import Figures, open_run
from fastbeit.evaluate.masked import unigram_baseline
from fastbeit.evaluate.pictures import GRAY, Look, entropy_map, hide, look_at, make_panels
from fastbeit.jobs.pretrain import pretrain
from fastbeit.jobs.report import verdict, write_report
from fastbeit.tokenizer.disk import save_tokenizer
from fastbeit.tokenizer.dvae import Decoder, Encoder
from helpers.faults import refuse
from helpers.pages import pictures_of
from helpers.tiny import make_parts, make_photos, make_tokenizer, write_config

PARTS = "attention.png", "curves.png", "predictions.png", "report.json"


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    build_index(make_photos(folder / "held_out", 4), folder / "held_out.idx")
    parts = {**make_parts(folder), "data.val_index": str(folder / "held_out.idx")}
    config = write_config(folder / "tiny.yaml")

    def make_run(name: str, *overrides: str) -> Path:
        settings = [f"{key}={value}" for key, value in parts.items()]
        pretrain(load_config(config, [*settings, f"out={folder / name}", *overrides]), ["fastbeit"])
        return folder / name

    return make_run


@pytest.mark.parametrize("problem", [None, "No module named 'nvidia'"], ids=["DALI", "no DALI"])
def test_a_run_by_dali_is_measured_where_there_is_none(make_run, monkeypatch, capsys, problem):
    run = make_run(f"by_dali_{problem is None}", "data.pipeline=torch", "optim.steps=1")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("pipeline: torch", "pipeline: dali"))
    monkeypatch.setattr(finished_run, "why_no_dali", lambda: problem)
    capsys.readouterr()
    trained = open_run(run)
    assert trained.config.data.pipeline == ("torch" if problem else "dali")
    said = "pipeline: torch (the run's was dali: No module named 'nvidia'); figures differ a little\n"
    assert capsys.readouterr().err == (said if problem else "")


@pytest.mark.parametrize("objective", ["tokens", "pixels"])
def test_the_page_stands_alone(make_run, objective):
    run = make_run(objective, f"objective={objective}", "optim.steps=3", "log.val_every=2")
    page, figures = write_report(run, None, num_crops=40)
    drawn = pictures_of(page.read_text())
    assert len(drawn) == 3 and all(min(picture.size) > 300 for picture in drawn)
    assert {path.name for path in (run / "report").iterdir()} == set(PARTS)
    assert json.loads((run / "report/report.json").read_text())["figures"]["loss"] == figures.loss
    assert f"{figures.loss:.3f}" in page.read_text() and verdict(figures)[:20] in page.read_text()
    assert (figures.baseline is None) == (objective == "pixels")


@pytest.fixture(scope="module")
def blocks(make_run, tmp_path_factory) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Panels and facts of a run whose decoder looks at one token at a time, and whose model says one word always."""
    local = make_tokenizer(tmp_path_factory.mktemp("local") / "dvae", seed=1)
    decoder = Decoder(Architecture(n_hid=8, n_init=8, vocab_size=32))
    with torch.no_grad():
        for weight in (value for name, value in decoder.named_parameters() if name.endswith("w")):
            centre = weight.shape[-1] // 2
            alone = torch.zeros_like(weight)
            alone[..., centre, centre] = weight[..., centre, centre]
            # far from the start, so that words look different
            weight.copy_(alone * 4)
    encoder, prefix = Encoder(decoder.arch), "encoder."
    tensors = load_file(local / "dvae.safetensors")
    encoder.load_state_dict({key[len(prefix) :]: tensors[key] for key in tensors if key.startswith(prefix)})
    save_tokenizer(local, encoder, decoder)
    run = open_run(make_run("blocks", "optim.steps=1", f"tokenizer.path={local}"))
    with torch.no_grad():
        run.model.lm_head.weight.zero_()
        run.model.lm_head.bias.copy_(torch.arange(32) == 7)
    look = look_at(run)
    panels = {title: images.numpy() for title, images in make_panels(run, look).items()}
    assert run.tokenizer
    word = run.tokenizer.decode(torch.full((1, 1), 7)).numpy()
    return panels, {"masked": look.masked.numpy(), "word": word[0]}


def patches(images: np.ndarray) -> np.ndarray:
    """[n, N, 8, 8, 3] of [n, 32, 32, 3]."""
    return images.reshape(-1, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(-1, 16, 8, 8, 3)


def test_the_masked_patches_are_gray_and_no_others(blocks):
    panels, facts = blocks
    seen, original = patches(panels["what the model sees"]), patches(panels["original"])
    assert 4 <= facts["masked"].sum() <= 4 * 6
    assert (seen[facts["masked"]] == GRAY).all()
    np.testing.assert_array_equal(seen[~facts["masked"]], original[~facts["masked"]])
    assert not (original[~facts["masked"]] == GRAY).all((1, 2, 3)).any()


def test_the_prediction_shows_the_model_where_masked_and_the_truth_elsewhere(blocks):
    panels, facts = blocks
    predicted, truth = patches(panels["its prediction, decoded"]), patches(panels["true tokens, decoded"])
    assert (predicted[facts["masked"]] == facts["word"]).all()
    np.testing.assert_array_equal(predicted[~facts["masked"]], truth[~facts["masked"]])
    assert len(np.unique(truth.reshape(-1, 8 * 8 * 3), axis=0)) > 4


def test_the_entropy_is_black_for_certainty_and_bright_for_ignorance():
    images, certain = torch.zeros(1, 16, 16, 3, dtype=torch.uint8), torch.zeros(32)
    certain[7] = 100
    outputs = torch.stack([certain, torch.zeros(32), certain, torch.zeros(32)])[None]
    predicted = torch.tensor([[True, True, False, False]])
    drawn = patches_of_two(entropy_map(Look(images, predicted, predicted, outputs, None), (2, 2)))
    # the ends of matplotlib's magma; the logarithm may round to the last colour but one
    assert (drawn[0] == [0, 0, 3]).all() and (np.abs(drawn[1].astype(int) - [252, 253, 191]) <= [1, 4, 4]).all()
    assert (drawn[2:] == GRAY).all()


def patches_of_two(images: torch.Tensor) -> np.ndarray:
    """[4, 8, 8, 3] of [1, 16, 16, 3]."""
    return images.numpy().reshape(2, 8, 2, 8, 3).swapaxes(1, 2).reshape(4, 8, 8, 3)


def test_pixels_are_painted_where_masked(make_run):
    run = open_run(make_run("pixels", "objective=pixels", "optim.steps=3", "log.val_every=2"))
    with torch.no_grad():
        run.model.lm_head.weight.zero_()
        # red, with mean and standard deviation 0.5: 255, 0, 0
        run.model.lm_head.bias.copy_(torch.tensor([1.0, -1.0, -1.0]).repeat_interleave(64))
    look = look_at(run)
    panels = make_panels(run, look)
    assert list(panels) == ["original", "what the model sees", "its prediction"]
    painted, original, masked = (
        patches(panels["its prediction"].numpy()),
        patches(look.images.numpy()),
        look.masked.numpy(),
    )
    assert (painted[masked] == [255, 0, 0]).all()
    np.testing.assert_array_equal(painted[~masked], original[~masked])


def test_where_nothing_is_masked_every_patch_is_shown_as_predicted(make_run):
    look = look_at(open_run(make_run("open", "mask=none", "predict=all", "optim.steps=1")))
    assert not look.masked.any() and look.predicted.all()


def test_hide_paints_masked_patches_of_a_rectangle():
    images = torch.randint(0, GRAY, (1, 4, 12, 3), dtype=torch.uint8)
    masked = torch.tensor([[False, True, False, True, False, False]])  # 2 x 3 patches of 2 x 4 pixels
    hidden = hide(images, masked, (2, 4))
    assert (hidden[0, :2, 4:8] == GRAY).all() and (hidden[0, 2:, :4] == GRAY).all()
    assert (hidden == GRAY).sum() == 2 * 2 * 4 * 3


def test_a_report_of_a_run_without_held_out_images_says_so(make_run):
    run = make_run("alone", "optim.steps=1", "data.val_index=")
    with (run / "log.jsonl").open("a") as log:
        # a line on its way
        log.write('{"step": 2, "lo')
    page, figures = write_report(run, None, num_crops=12)
    assert not figures.held_out and "none were held out" in page.read_text()


def test_a_patch_that_the_model_has_not_is_said_before_anything_is_measured(make_run, monkeypatch):
    run = make_run("alone", "optim.steps=1", "data.val_index=")
    monkeypatch.setattr("fastbeit.jobs.report.measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(RunError, match="--points 4,0 is no patch of a grid of 4 x 4"):
        write_report(run, None, 12, Reference(points=((4, 0),)))


def test_a_folder_that_is_no_run_or_has_no_checkpoint_is_said(make_run, tmp_path):
    with pytest.raises(RunError, match="is no run directory"):
        write_report(tmp_path, None, 12)
    shutil.copy(make_run("alone", "optim.steps=1", "data.val_index=") / "config.yaml", tmp_path)
    with pytest.raises(RunError, match="no checkpoint in"):
        write_report(tmp_path, None, 12)


def test_another_tokenizer_or_none_is_said(make_run, tmp_path):
    mine = make_tokenizer(tmp_path / "dvae", seed=2)
    run = make_run("other", "optim.steps=1", f"tokenizer.path={mine}")
    make_tokenizer(mine, seed=3)
    with pytest.raises(RunError, match="is not the tokenizer that the run was trained with") as caught:
        write_report(run, None, 12)
    assert caught.value.exit_code == 78
    shutil.rmtree(mine)
    with pytest.raises(RunError, match="tokenizer .* is gone") as caught:
        write_report(run, None, 12)
    assert caught.value.exit_code == 66


def test_the_baseline_is_the_smoothed_cross_entropy():
    training, held_out = torch.tensor([3, 1, 0]), torch.tensor([1, 0, 1])
    share = np.array([3.5, 1.5, 0.5]) / 5.5
    assert unigram_baseline(training, held_out) == pytest.approx(-(np.log(share[0]) + np.log(share[2])) / 2)


def test_a_model_that_learnt_nothing_is_called_so():
    figures = Figures(True, 4.2, 0.01, 4.1, 3.9, 50, 64, 4.0, 0.02, 4.1)
    assert "has learnt nothing of use" in verdict(figures)


@pytest.mark.parametrize("place", ["the folder of pictures", "the page", "the page's folder"])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(make_run, tmp_path, monkeypatch, place):
    run, page = (
        shutil.copytree(make_run("alone", "optim.steps=1", "data.val_index="), tmp_path / "run"),
        tmp_path / "page",
    )
    shutil.rmtree(run / "report", ignore_errors=True)
    if place == "the page":
        page.mkdir()
    else:
        (run / "report" if "pictures" in place else page).write_text("a file where a folder should be")
        page = page / "page.html" if "page" in place else page
    monkeypatch.setattr("fastbeit.jobs.report.measure", lambda *_: pytest.fail("measured"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="the report of '.*run' cannot be written") as caught:
        write_report(run, page, 12)
    assert caught.value.exit_code == 74 and sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_report_that_was_there(make_run, tmp_path, monkeypatch):
    run = shutil.copytree(make_run("alone", "optim.steps=1", "data.val_index="), tmp_path / "run")
    # what a kill and a power cut leave does not matter either
    (run / "config.yaml").write_bytes(b"")
    with (run / "log.jsonl").open("ab") as log:
        log.write(b"\0\0\n\xff\n[]\n")
    _, figures = write_report(run, None, 12)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refuse(monkeypatch, os.replace, errno.ENOSPC, lambda source, target: Path(target).name == "report.html")
    with pytest.raises(RunError, match="No space left") as caught:
        write_report(run, None, 24)
    assert caught.value.exit_code == 74 and figures.loss > 0
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.keys() == before.keys() and after[run / "report.html"] == before[run / "report.html"]
