"""Where a classifier is wrong, against a loop over images one at a time."""

from typing import Any

import numpy as np
import pytest
import torch

from fastbeit.config.sections import DataConfig
from fastbeit.data.batch import Batch
from fastbeit.data.decode import decode_reference
from fastbeit.data.labelled import centre_crop
from fastbeit.engine.ranks import World
from fastbeit.errors import DATA_MISSING, DataError
from fastbeit.evaluate import mistakes
from fastbeit.evaluate.classify import classify, rows_of
from fastbeit.evaluate.mistakes import Answers, examine, most_frequent
from fastbeit.model.classify import Classifier
from fastbeit.train.stop import Stop
from helpers.finetuned import CLASSES, classifier, index_of

CPU = torch.device("cpu")
DATA = DataConfig(image_size=(32, 32), num_workers=0, pipeline="pillow")
HELD_OUT = {"b": 7, "c": 3, "d": 4, "e": 2, "f": 5, "g": 1}  # images a class; "a" has none


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return index_of(tmp_path_factory.mktemp("mistakes"), HELD_OUT)


@pytest.fixture(scope="module")
def model() -> Classifier:
    return classifier(len(CLASSES))


def one_by_one(model: Classifier, index: Any) -> list[tuple[str, np.ndarray]]:
    """Class and probabilities [C] of each image."""
    found = []
    for i in range(len(index)):
        size = int(index.heights[i]), int(index.widths[i])
        image = centre_crop(decode_reference(index.read_bytes(i), size, "high_byte"), (32, 32))
        with torch.no_grad():
            logits = model.logits(torch.tensor(image)[None])[0].double().numpy()
        found.append((index.path(i).parent.name, np.exp(logits) / np.exp(logits).sum()))
    return found


@pytest.mark.parametrize("batch", [4, 256])
def test_figures_and_mistakes_are_those_of_one_image_at_a_time(monkeypatch, model, index, batch):
    monkeypatch.setattr(mistakes, "MAX_BATCH", batch)
    monkeypatch.setattr(mistakes, "NUM_MISTAKES", 6)
    found, wanted = examine(model, DATA, index, CLASSES, CPU), one_by_one(model, index)
    order = [probabilities.argsort()[::-1] for _, probabilities in wanted]
    labels = [CLASSES.index(name) for name, _ in wanted]
    assert found.labels.tolist() == labels and found.guesses.tolist() == [best[0] for best in order]
    assert found.top1 == np.mean([best[0] == label for best, label in zip(order, labels, strict=True)])
    assert found.top5 == np.mean([label in best[:5] for best, label in zip(order, labels, strict=True)])
    assert 0 < found.top1 < found.top5 < 1
    losses = [-np.log(probabilities[label]) for (_, probabilities), label in zip(wanted, labels, strict=True)]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    # the sure ones first
    wrong = [i for i in range(len(wanted)) if order[i][0] != labels[i]]
    wrong.sort(key=lambda i: -wanted[i][1].max())
    assert found.num_mistakes == len(wrong) > 6
    assert [one.sample for one in found.mistakes] == wrong[:6]
    for one in found.mistakes:
        assert (one.label, one.guess) == (labels[one.sample], order[one.sample][0])
        assert one.probability == pytest.approx(wanted[one.sample][1].max(), rel=1e-5)
        size = int(index.heights[one.sample]), int(index.widths[one.sample])
        image = centre_crop(decode_reference(index.read_bytes(one.sample), size, "high_byte"), (32, 32))
        assert np.array_equal(one.image, image)


def test_figures_are_those_of_a_validation(model, tmp_path):
    """All classes have images, so that those of the index are in the order of the head."""
    index = index_of(tmp_path, dict.fromkeys(CLASSES, 2))
    found = examine(model, DATA, index, CLASSES, CPU)
    wanted = classify(model, DATA, index, CLASSES, World(rank=0, size=1, device=CPU), Stop())
    assert (found.top1, found.top5, len(found.labels)) == (wanted.top1, wanted.top5, wanted.num_images)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)


def test_classes_are_told_by_their_names(model, index):
    assert index.class_names == ["b", "c", "d", "e", "f", "g"]
    assert rows_of(index, CLASSES)[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert rows_of(index, ["g", "b"])[0].tolist() == [1, -1, -1, -1, -1, 0]
    assert most_frequent(index, CLASSES, 3) == [1, 5, 3]
    assert most_frequent(index, ["g", "c", "x"], 2) == [1, 0]


def test_what_cannot_be_judged_is_left_out_and_counted(model, tmp_path):
    index = index_of(tmp_path, {"_unheard of": 4, "b": 3, "c": 4})
    index.path(5).write_bytes(b"?")
    found = examine(model, DATA, index, CLASSES, CPU)
    assert (found.num_bad, found.num_unknown, found.labels.tolist()) == (1, 4, [1, 1, 2, 2, 2, 2])
    # those after them are not taken for others
    places = {sample: place for place, sample in enumerate([4, 6, 7, 8, 9, 10])}
    wrong = (found.labels != found.guesses).nonzero()[:, 0].tolist()
    assert wrong and sorted(places[one.sample] for one in found.mistakes) == wrong
    assert all(one.guess == found.guesses[places[one.sample]] for one in found.mistakes)
    with pytest.raises(DataError, match="none of the 11 images of .* is valid and of a class") as caught:
        examine(classifier(2), DATA, index, ["x", "y"], CPU)
    assert caught.value.exit_code == DATA_MISSING


def test_the_worst_classes_are_those_with_the_least_accuracy():
    #       class 3: 0 of 1      7: 0 of 2 1: 1 of 3         5: 2 of 2
    labels = torch.tensor([3, 7, 7, 1, 1, 1, 5, 5])
    guess = torch.tensor([5, 1, 1, 1, 5, 7, 5, 5])
    found = Answers(labels, guess, 0.0, 0.0, 0.0, 0, 0, [])
    scores = found.worst_classes(9)
    assert [(one.label, one.num_right, one.num_images) for one in scores] == [(7, 0, 2), (3, 0, 1), (1, 1, 3)]
    assert [one.taken_for for one in scores] == [1, 5, 5] and found.worst_classes(1) == scores[:1]
    assert found.share_of([1]) == 3 / 8 and found.share_of([7, 2]) == 2 / 8 and found.num_mistakes == 5


def test_of_the_whole_imagenet_little_stays_in_memory():
    """21,841 classes: a few numbers an image stay, and the pictures that are shown, not their batches."""
    gathered, num_classes = mistakes._Gathered(), 21_841
    for step in range(3):
        images = torch.full((64, 8, 8, 3), step, dtype=torch.uint8)
        sample = torch.arange(64) + 64 * step
        batch = Batch(images, None, sample, torch.zeros(64, dtype=torch.int64), [], None)
        logits = torch.randn(64, num_classes, generator=torch.Generator().manual_seed(step))
        gathered.add(batch, torch.arange(64), logits)
    kept = [one.image.untyped_storage().nbytes() for one in gathered._mistakes]
    assert kept == [8 * 8 * 3] * mistakes.NUM_MISTAKES
    assert sum(one.untyped_storage().nbytes() for one in (*gathered._labels, *gathered._guesses)) <= 3 * 64 * 8 * 2
