"""`fastbeit predict`: the classes of the images of a source, as a table and as JSON."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.running import EngineConfig
from fastbeit.data.index.given import opened
from fastbeit.data.index.reader import Index
from fastbeit.engine.ranks import device_of
from fastbeit.errors import CANNOT_CREATE, DATA_MISSING, DONE, DataError, writing
from fastbeit.evaluate.classify import rows_of
from fastbeit.evaluate.features import look_at
from fastbeit.evaluate.frozen import Frozen, ModelSource, open_frozen
from fastbeit.files import aside, put_in_place, try_to_write
from fastbeit.plural import counted
from fastbeit.train.stop import Stop

TOP = 5  # that a class has to be among


def predict(model: ModelSource, source: Path, top: int, json_path: Path | None) -> int:
    """Print a line an image: its path, and its likeliest classes with their probabilities; returns the exit code.

    Where the source has labels, and their classes are those of the model, it says how many are right.

    Args:
        source: an index, or whatever `fastbeit index` takes.
        json_path: a file for the same, whole or not at all.

    Raises:
        RunError: the model has no head (2), or the file cannot be written (73; 74 where the disk is full).
        DataError: there is no image in the source, or none is valid (66).
        KeyboardInterrupt: stopped; there is no file.
    """
    frozen = open_frozen(model, device_of(EngineConfig()))
    frozen.classifier()
    with opened(source, frozen.data.levels) as index, JsonFile(json_path) as file, Stop() as stop:
        rows, why = _rows_of_labels(index, frozen.classes)
        score, bad = Score(), []
        for found in _asked(frozen, index, max(top, TOP), rows, score, bad, stop):
            likely = found["classes"] = found["classes"][:top]
            told = "\t".join(f"{one['class']} {one['probability']:.4f}" for one in likely)
            print(f"{_printable(found['path'])}\t{told}")
            file.add(found)
        if stop.wanted:
            raise KeyboardInterrupt
        if not score.num_images:
            raise DataError(f"none of the {len(index)} images of '{source}' is valid", DATA_MISSING)
        accuracy = score.figures()
        file.finish({"model": f"{frozen.origin.dialect}: {frozen.origin.file}", "bad": bad, "accuracy": accuracy})
    _say(bad, accuracy, why)
    return DONE


class Score:
    """How many of the images that have a class are classified as it."""

    def __init__(self) -> None:
        self.num_images = self.num_labelled = self.num_first = self.num_among = 0

    def add(self, likely: list[int], wanted: int | None) -> None:
        """
        Args:
            likely: rows of the head, the likeliest first.
            wanted: the row of the image's class; None: not known.
        """
        self.num_images += 1
        if wanted is not None:
            self.num_labelled += 1
            self.num_first += likely[0] == wanted
            self.num_among += wanted in likely[:TOP]

    def figures(self) -> dict[str, float] | None:
        if not self.num_labelled:
            return None
        count = self.num_labelled
        return {"top1": self.num_first / count, "top5": self.num_among / count, "images": count}


@torch.no_grad()
def _asked(
    frozen: Frozen, index: Index, top: int, rows: np.ndarray | None, score: Score, bad: list[str], stop: Stop
) -> Iterator[dict[str, Any]]:
    """Of each image in order what the JSON says of it, with `top` classes."""
    model = frozen.classifier()

    def ask(images: Tensor) -> Any:
        probabilities = model.logits(images).float().softmax(1)
        return probabilities.topk(min(top, probabilities.shape[1]))

    for batch, likely in look_at(frozen.data, index, ask, frozen.device, stop, "predictions"):
        bad += [reason for _, reason in batch.bad]
        if likely is None:
            continue
        for i, values, classes in zip(
            batch.sample.tolist(), likely.values.tolist(), likely.indices.tolist(), strict=True
        ):
            label = int(index.labels[i])
            score.add(classes, int(rows[label]) if rows is not None and label >= 0 else None)
            names = map(frozen.class_name, classes)
            told = [{"class": name, "probability": value} for name, value in zip(names, values, strict=True)]
            yield {"path": index.name(i), "label": index.class_names[label] if label >= 0 else None, "classes": told}


def _rows_of_labels(index: Index, classes: list[str] | None) -> tuple[np.ndarray | None, str]:
    """The head's row of each label of the index, or why labels cannot be compared, in words."""
    if not (index.labels >= 0).any():
        return None, ""
    if classes is None:
        return None, "the model does not name its classes"
    rows, unknown = rows_of(index, classes)
    if unknown:
        name = index.class_names[unknown[0]]
        return None, f"the model has no class {name!r}" + f" and {len(unknown) - 1} more" * (len(unknown) > 1)
    return rows.numpy(), ""


def _say(bad: list[str], accuracy: dict[str, float] | None, why: str) -> None:
    """Beside the table."""
    if accuracy:
        num_images = counted(int(accuracy["images"]), "image")
        print(
            f"top-1 {accuracy['top1']:.2%}  top-5 {accuracy['top5']:.2%}  of {num_images} with a label", file=sys.stderr
        )
    elif why:
        print(f"labels are not compared: {why}", file=sys.stderr)
    for reason in bad:
        print(f"bad image: {_printable(reason)}", file=sys.stderr)


def _printable(text: str) -> str:
    """On one line, whatever a name holds."""
    return text if text.isprintable() else repr(text)


class JsonFile:
    """A list `images` that is written one by one and not kept, and what is said at its end; whole or not at all.

    Args:
        path: None: it is nowhere.

    Raises:
        RunError: it cannot be written (73; 74 where the disk is full).
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self._is_first = path, True

    def __enter__(self) -> "JsonFile":
        if self.path:
            with self._writing():
                try_to_write(self.path)
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = aside(self.path).open("w", encoding="utf-8")
            self._write('{\n "images": [')
        return self

    def __exit__(self, *exception: object) -> None:
        if self.path:
            self._file.close()
            aside(self.path).unlink(missing_ok=True)

    def add(self, image: dict[str, Any]) -> None:
        self._write(("\n  " if self._is_first else ",\n  ") + json.dumps(image))
        self._is_first = False

    def finish(self, said: dict[str, Any]) -> None:
        self._write("\n ],\n" + json.dumps(said, indent=1)[2:] + "\n")
        if self.path:
            with self._writing():
                self._file.close()
                put_in_place(self.path)

    def _write(self, text: str) -> None:
        if self.path:
            with self._writing():
                self._file.write(text)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(f"'{self.path}'", exit_code=CANNOT_CREATE)
