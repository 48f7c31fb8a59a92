"""The page of a run: what it shows is what the run did, and it needs nothing but itself."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbeit.config import load_config
from fastbeit.data.index import build_index
from fastbeit.errors import RunError
from fastbeit.evaluate import unigram_baseline
from fastbeit.pictures import GRAY, hide, prediction_panels
from fastbeit.pretrain import pretrain
from fastbeit.report import verdict, write_report
from fastbeit.trained import Figures, open_run
from tiny import make_parts, make_photos, write_config


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


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize("objective", ["tokens", "pixels"])
def test_the_page_stands_alone(make_run, objective):
    run = make_run(objective, f"objective={objective}", "optim.steps=3", "log.val_every=2")
    page, figures = write_report(run)
    links = Links()
    links.feed(page.read_text())
    assert links.tags.count("img") == 2
    assert all(source.startswith("data:image/png;base64,") for source in links.sources)
    assert {path.name for path in (run / "report").iterdir()} == {"curves.png", "predictions.png", "report.json"}
    assert json.loads((run / "report/report.json").read_text())["loss"] == figures.loss
    assert f"{figures.loss:.3f}" in page.read_text() and verdict(figures)[:20] in page.read_text()
    assert (figures.baseline is None) == (objective == "pixels")


def test_the_panels_are_what_they_say(make_run):
    """Gray where masked and nowhere else; the true token where not masked, the model's where it is."""
    run = open_run(make_run("panels", "optim.steps=1"))
    panels = prediction_panels(run)
    original, seen, predicted, truth = panels.values()
    assert original.shape == truth.shape == (4, 32, 32, 3)
    patches = (seen == GRAY).reshape(4, 4, 8, 4, 8, 3).all((2, 4, 5))
    assert 1 <= patches.sum((1, 2)).min() and patches.sum((1, 2)).max() <= 6
    unmasked = ~patches.repeat(8, 1).repeat(8, 2)
    np.testing.assert_array_equal(seen[unmasked], original[unmasked])
    assert run.tokenizer is not None
    # decoded images agree where no masked patch is in the decoder's sight: at least where nothing is masked at all
    tokens = run.tokenizer.encode(torch.from_numpy(original))
    np.testing.assert_array_equal(run.tokenizer.decode(tokens).numpy().shape, predicted.shape)


def test_hide_paints_masked_patches_of_a_rectangle():
    images = torch.randint(0, GRAY, (1, 4, 12, 3), dtype=torch.uint8)
    masked = torch.tensor([[False, True, False, True, False, False]])  # 2 x 3 patches of 2 x 4 pixels
    hidden = hide(images, masked, (2, 4))
    assert (hidden[0, :2, 4:8] == GRAY).all() and (hidden[0, 2:, :4] == GRAY).all()
    assert (hidden == GRAY).sum() == 2 * 2 * 4 * 3


def test_a_report_of_a_run_without_held_out_images_says_so(make_run):
    run = make_run("alone", "optim.steps=1", "data.val_index=")
    page, figures = write_report(run)
    assert not figures.held_out and "none were held out" in page.read_text()


def test_a_folder_that_is_no_run_or_has_no_checkpoint_is_said(make_run, tmp_path):
    with pytest.raises(RunError, match="is no run directory"):
        write_report(tmp_path)
    shutil.copy(make_run("panels", "optim.steps=1") / "config.yaml", tmp_path)
    with pytest.raises(RunError, match="no checkpoint in"):
        write_report(tmp_path)


def test_the_baseline_is_the_smoothed_cross_entropy():
    training, held_out = torch.tensor([3, 1, 0]), torch.tensor([1, 0, 1])
    share = np.array([3.5, 1.5, 0.5]) / 5.5
    assert unigram_baseline(training, held_out) == pytest.approx(-(np.log(share[0]) + np.log(share[2])) / 2)


def test_a_model_that_learnt_nothing_is_called_so():
    figures = Figures(True, 4.2, 0.01, 4.1, 50, 64, 4.0, 0.02, 4.1)
    assert "has learnt nothing of use" in verdict(figures)
