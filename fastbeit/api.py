"""fastbeit in a notebook: `import fastbeit`, then `fastbeit.load`, `fastbeit.pretrain`, `fastbeit.finetune`."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.read import load_config
from fastbeit.config.running import EngineConfig
from fastbeit.data.in_memory import Picture, one_by_one, view_of
from fastbeit.engine.ranks import device_of
from fastbeit.errors import DONE, RunError
from fastbeit.evaluate.features import BATCH, Kind, check_blocks, check_kind, features_of
from fastbeit.evaluate.frozen import Frozen, ModelSource, open_frozen
from fastbeit.weights.dialect import Channels

Images = Picture | Iterable[Picture]


class Prediction(NamedTuple):
    name: str  # of a class; its number where nobody named it
    probability: float


class Model:
    """A trained encoder, and its classes if it was fine-tuned."""

    def __init__(self, frozen: Frozen) -> None:
        self._frozen = frozen

    def __repr__(self) -> str:
        data, origin = self._frozen.data, self._frozen.origin
        height, width = data.image_size
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"<{origin.dialect} {origin.file}: {self.depth} blocks, images of {height}x{width}{classes}>"

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self._frozen.depth

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes that it was fine-tuned on; None: it was not, or its file does not name them."""
        return self._frozen.classes

    def features(
        self, images: Images, blocks: int | Iterable[int] | None = None, kind: Kind = "cls"
    ) -> Tensor | dict[int, Tensor]:
        """Raw outputs of blocks, with no norm applied, of the middle of each image.

        Args:
            images: one or several: paths, PIL images, uint8 arrays or tensors [height, width, 3].
            blocks: from 0 to `depth` - 1; None: the last.
            kind: cls, mean (over the patches), concat (both), or patches (each in its place).

        Returns:
            float32 [B, D], for concat [B, 2 D], for patches [B, grid height, grid width, D]; where several blocks are
            wanted, of each of them by its number.

        Raises:
            RunError: no such block; an image cannot be read.
            ValueError: an array of another shape or dtype, or no image.
        """
        wanted = check_blocks([blocks] if isinstance(blocks, int) else blocks, self.depth)
        check_kind(kind)
        parts = [*self._asked(images, lambda views: features_of(self._frozen.model, views, wanted, kind))]
        found = {block: torch.cat([part[block].cpu() for part in parts]) for block in wanted}
        return found[wanted[0]] if blocks is None or isinstance(blocks, int) else found

    @torch.no_grad()
    def predict(self, images: Images, top: int = 5) -> list[list[Prediction]]:
        """The most likely classes of each image, the likeliest first; arguments and errors as in `features`.

        Raises:
            RunError: the model has no head over classes.
            ValueError: `top` is below 1; and as `features`.
        """
        if top < 1:
            raise ValueError(f"top wants a number from 1 on; got {top}")
        model = self._frozen.classifier()
        found = []
        for logits in self._asked(images, model.logits):
            likely = logits.float().softmax(1).topk(min(top, logits.shape[1]))
            for values, rows in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
                names = map(self._frozen.class_name, rows)
                found.append([Prediction(*one) for one in zip(names, values, strict=True)])
        return found

    def _asked(self, images: Images, ask: Callable[[Tensor], Any]) -> Iterator[Any]:
        views = (view_of(image, self._frozen.data) for image in one_by_one(images))
        is_empty = True
        while part := [*itertools.islice(views, BATCH)]:
            is_empty = False
            yield ask(torch.from_numpy(np.stack(part)).to(self._frozen.device))
        if is_empty:
            raise ValueError("one image or several are wanted; got none")


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Model:
    """A model to be asked: of a run, a checkpoint, what `fastbeit convert` wrote, or a file of another dialect.

    Args:
        device: None: cuda when there is one.
        mean, std: that pixels in [0, 1] are normalised with, where the file does not say.

    Raises:
        RunError: it is not there, damaged, of no known dialect, or does not say how its images were normalised.
    """
    place = device_of(EngineConfig()) if device is None else torch.device(device)
    return Model(open_frozen(ModelSource(Path(os.path.expanduser(path)), mean, std), place))


def pretrain(
    config: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, out: str | os.PathLike[str] = ""
) -> Path:
    """`fastbeit pretrain CONFIG key=value ...`; the same call again goes on with a run that was interrupted.

    Args:
        config: a YAML file, or the name of one that comes with fastbeit.
        settings: keys of the command, with dots, and their values: {"data.index": "images.idx", "optim.epochs": 10}.
        out: the run directory; it may stand in `settings` instead.

    Returns:
        The run directory, for `load`.

    Raises:
        RunError: as the command ends with an exit code, `exit_code`; also where it was stopped (75).
    """
    from fastbeit.jobs.pretrain import pretrain as run

    return _trained(run, "pretrain", Config, config, settings, out)


def finetune(
    config: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, out: str | os.PathLike[str] = ""
) -> Path:
    """`fastbeit finetune CONFIG key=value ...`, likewise; {"init": "runs/base"} says what it starts from."""
    from fastbeit.jobs.finetune import finetune as run

    return _trained(run, "finetune", FinetuneConfig, config, settings, out)


def _trained(
    run: Callable[[Any, list[str]], int],
    verb: str,
    model: type[Config] | type[FinetuneConfig],
    config: str | os.PathLike[str],
    settings: Mapping[str, Any] | None,
    out: str | os.PathLike[str],
) -> Path:
    given = dict(settings or {}) | ({"out": out} if out else {})
    typed = [f"{key}={_typed(value)}" for key, value in given.items()]
    read = load_config(os.fspath(config), typed, model)
    code = run(read, ["fastbeit", verb, os.fspath(config), *typed])
    if code != DONE:
        raise RunError(f"stopped before its end, and saved in '{read.out}'; the same call again goes on", code)
    return Path(read.out)


def _typed(value: Any) -> str:
    """As it is typed in a command."""
    return os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value)
