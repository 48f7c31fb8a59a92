"""Features of labelled images, and k-NN on them: by several ranks as by one, and a stop ends all of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastbeit.cli import main
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.engine.ranks import World
from fastbeit.errors import DATA_MISSING, ConfigError, DataError, RunError
from fastbeit.evaluate import probe
from fastbeit.evaluate.frozen import ModelSource, open_frozen
from fastbeit.evaluate.probe import Cached, classes_of, extract, knn, strange
from fastbeit.train.stop import Stop, StopWanted
from fastbeit.train.together import together
from helpers import photos
from helpers.dialects import WIDTH, pretrained_run
from helpers.labelled import write_classes
from helpers.ranks_in_threads import of_each_rank

CPU = torch.device("cpu")
ONE = World(0, 1, CPU)


def indexed(folder: Path) -> Path:
    build_index(folder, folder.with_suffix(".idx"), progress=False)
    return folder.with_suffix(".idx")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    train = indexed(write_classes(folder / "train", range(6), rocket=range(9)))
    write_classes(folder / "val", range(20, 23))
    (folder / "val/cat/21.png").write_bytes(photos.encoded(photos.small_photo(), "PNG"))
    val = indexed(folder / "val")
    # damaged after it was indexed
    damaged = bytearray((folder / "val/cat/21.png").read_bytes())
    damaged[2000:2100] = bytes(100)
    (folder / "val/cat/21.png").write_bytes(damaged)
    frozen = open_frozen(ModelSource(pretrained_run(folder / "run")), CPU)
    return frozen, open_index(train), open_index(val)


def features(place, world: World, index: int, classes, **more) -> Cached:
    frozen = place[0]
    rows = (classes.train, classes.val)[index - 1]
    return extract(frozen.model, frozen.data, place[index], rows, [0, 1], "concat", world, torch.float32, **more)


def figures(place, world: World, stop: Stop | None = None):
    classes = classes_of(*place[1:])
    known, asked = (features(place, world, index, classes) for index in (1, 2))
    return knn(known, asked, len(classes), 5, world, stop or Stop())


def test_each_image_is_looked_at_once_and_bad_ones_are_left_out(place, capsys):
    classes = classes_of(*place[1:])
    known, asked = features(place, ONE, 1, classes), features(place, ONE, 2, classes, what="held-out images")
    assert known.values.shape == (27, 2, 2 * WIDTH) and known.num_bad == 0
    assert asked.values.shape == (11, 2, 2 * WIDTH) and asked.num_bad == 1
    assert known.rows.bincount().tolist() == [6, 6, 9, 6] and asked.rows.bincount().tolist() == [2, 3, 3, 3]


@pytest.mark.parametrize("size", [2, 5])
def test_several_ranks_say_what_one_says(place, monkeypatch, size):
    """Batches of 4 a rank: of the last ones a rank may have none."""
    alone = figures(place, ONE)
    assert 0.5 < alone[1].top1 < alone[1].top5 == 1
    monkeypatch.setattr(probe, "MAX_BATCH", 4)
    assert of_each_rank(size, lambda world: figures(place, world)) == [alone] * size


def test_a_stop_or_an_error_of_one_rank_ends_it_on_all(place, monkeypatch):
    def stopped(world: World):
        stop = Stop()
        stop.wanted = world.rank == 1
        with pytest.raises(StopWanted):
            figures(place, world, stop)
        return True

    assert of_each_rank(3, stopped) == [True] * 3

    def failed(world: World):
        with pytest.raises(RunError, match="the disk is gone") as caught:
            with together(world, Stop()):
                if world.rank == 2:
                    raise DataError("the disk is gone")
        return caught.value.exit_code

    assert of_each_rank(3, failed) == [DATA_MISSING] * 3


def test_no_valid_image_is_told_to_all_ranks(place):
    classes = classes_of(*place[1:])
    none = Cached(torch.empty(0), torch.empty(0, dtype=torch.int64), 3)

    def ask(world: World):
        known = features(place, world, 1, classes)
        with pytest.raises(DataError, match="none of the images that a probe classifies is valid"):
            knn(known, none, len(classes), 5, world, Stop())
        with pytest.raises(DataError, match="none of the images that a probe learns from is valid"):
            knn(none, known, len(classes), 5, world, Stop())
        return True

    assert of_each_rank(2, ask) == [True] * 2


def listed(folder: Path, name: str, classes: list[str | None]) -> Path:
    """A list of images with classes, or with none."""
    photos.small_photo().save(folder / "photo.png")
    lines = ["photo.png" + (f"\t{one}" if one else "") for one in classes]
    # a list may name a file once
    for i in range(len(lines)):
        photos.small_photo().save(folder / f"{i}.png")
    (folder / f"{name}.txt").write_text("".join(f"{i}{line[5:]}\n" for i, line in enumerate(lines)))
    assert main(["index", str(folder / f"{name}.txt"), "-o", str(folder / f"{name}.idx")]) == 0
    return folder / f"{name}.idx"


def test_classes_are_those_that_have_images(tmp_path):
    """By name, whatever their numbers; gaps make no rows, and a class that is held out alone is never right."""
    train = open_index(listed(tmp_path, "train", ["9", "2", "9", "ant", "bee"]))
    val = open_index(listed(tmp_path, "val", ["ant", "2", "cow", "9", "dog", "cow"]))
    classes = classes_of(train, val)
    assert classes.names == [name for name in train.class_names if name in ("2", "9", "ant", "bee")]
    for index, rows in ((train, classes.train), (val, classes.val)):
        for label in np.unique(index.labels):
            name = index.class_names[label]
            assert rows[label] == (classes.names.index(name) if name in classes.names else -1)
    assert strange(classes) == "2 classes of the held-out images without an image in training: never right"


@pytest.mark.parametrize(
    "train, val, error, message",
    [
        (
            [None, None],
            ["a", "b"],
            DataError,
            "2 of 2 images have no label, such as .*0.png",
        ),
        (["a", "b"], ["a", None], DataError, "1 of 2 images have no label, such as .*1.png"),
        (
            ["a", "a"],
            ["a"],
            ConfigError,
            "all images to learn from, such as .* are of one class, 'a'; a probe wants two or more",
        ),
        (["a", "b"], ["c"], ConfigError, "have no class in common: 'c' there, 'a' here"),
    ],
)
def test_what_cannot_be_probed_is_refused(tmp_path, train, val, error, message):
    indices = [open_index(listed(tmp_path, name, labels)) for name, labels in (("train", train), ("val", val))]
    with pytest.raises(error, match=message):
        classes_of(*indices)
