"""A run that was trained: its newest checkpoint, opened, and what it knows of images that it has not seen."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbeit.config.pretrain import Config
from fastbeit.config.read import as_saved, read_saved
from fastbeit.config.running import KernelsConfig
from fastbeit.data.index.given import INDICES, NAMES
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.loader import why_no_dali
from fastbeit.engine.ranks import World
from fastbeit.errors import CHECKPOINT_UNUSABLE, DATA_MISSING, USAGE, ConfigError, DataError, RunError
from fastbeit.evaluate.masked import evaluate, token_histogram, unigram_baseline
from fastbeit.model.beit import Beit, make_beit, num_outputs
from fastbeit.model.kernels import chosen_kernels
from fastbeit.tokenizer.disk import bundled_path, load_tokenizer
from fastbeit.tokenizer.protocol import Tokenizer
from fastbeit.train.checkpoint import load_model, load_state, resolve_checkpoint
from fastbeit.train.ema import PREFIX
from fastbeit.train.stop import Stop

UNREADABLE = ConfigError, OSError, ValueError, RecursionError  # a config.yaml that is not there, or damaged


@dataclass(frozen=True)
class Trained:
    """A run's newest checkpoint, ready to be asked."""

    config: Config
    world: World
    checkpoint: Path
    state: dict[str, Any]
    model: Beit
    tokenizer: Tokenizer | None
    index: Index
    val_index: Index | None

    @property
    def unseen(self) -> Index:
        """Held-out images, or those of training where none were held out."""
        return self.val_index or self.index


@dataclass(frozen=True)
class Figures:
    """Losses in nats a masked patch (tokens), or squared error (pixels); baselines are None for pixels."""

    held_out: bool  # else all figures are of training images, in unseen crops
    loss: float
    accuracy: float
    baseline: float | None  # knows how frequent words are in training, and sees no image
    own_baseline: float | None  # knows how frequent they are in these very images, and sees no image
    words_in_use: int | None
    vocab_size: int | None
    train_crops_loss: float
    train_crops_accuracy: float
    train_crops_baseline: float | None

    @property
    def gain(self) -> float | None:
        """Nats below the baseline on held-out images."""
        return None if self.baseline is None else self.baseline - self.loss

    @property
    def train_crops_gain(self) -> float | None:
        return None if self.train_crops_baseline is None else self.train_crops_baseline - self.train_crops_loss


@dataclass(frozen=True)
class Moved:
    """What lies elsewhere than the run's settings say; None: it does not. The images are named by indices."""

    tokenizer: Path | None = None
    index: Path | None = None
    val_index: Path | None = None


def open_run(run: Path, moved: Moved | None = None) -> Trained:
    """Load the newest verified checkpoint of a run directory.

    Raises:
        RunError: no run (2), no checkpoint (78), or its images or tokenizer are gone (66) or others by now (78).
    """
    check_run(run)
    checkpoint = resolve_checkpoint(run)
    state = load_state(checkpoint)
    config, moved = _with_a_pipeline(as_saved(Config, settings_of(run, state))), moved or Moved()
    world = World(rank=0, size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = _tokenizer_of(config, state, moved, world.device) if config.objective == "tokens" else None
    index = trained_index(run, moved, config.data.index, state)
    has_val_index = bool(moved.val_index or config.data.val_index)
    # by what runs here, whatever the run was trained by
    free = config.model_copy(update={"kernels": KernelsConfig()})
    vocab_size = tokenizer.vocab_size if tokenizer else None
    config = chosen_kernels(free, num_outputs(config, vocab_size), world).config
    model = make_beit(config, vocab_size)
    try:
        model.load_state_dict(kept_weights(load_model(checkpoint)))
    except RuntimeError as err:
        problem = str(err).splitlines()[0]
        raise RunError(f"'{checkpoint}' does not fit the run's model: {problem}", CHECKPOINT_UNUSABLE) from err
    return Trained(
        config=config,
        world=world,
        checkpoint=checkpoint,
        state=state,
        model=model.to(world.device),
        tokenizer=tokenizer,
        index=index,
        val_index=index_of(run, "val_index", moved.val_index, config.data.val_index) if has_val_index else None,
    )


def kept_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint's weights the average where there is one, as validation sees it."""
    averaged = {name.removeprefix(PREFIX): one for name, one in weights.items() if name.startswith(PREFIX)}
    return averaged or weights


def _tokenizer_of(config: Config, state: dict[str, Any], moved: Moved, device: torch.device) -> Tokenizer:
    """That of the run: where the user names it, or where its settings do; or where it was when its tokens were made."""
    places = [config.tokenizer.path, state.get("tokenizer_path") or config.tokenizer.path]
    found, exit_code = [], DATA_MISSING
    for place in [str(moved.tokenizer)] if moved.tokenizer else dict.fromkeys(places):
        if place and not Path(place).exists():
            found.append(f"the run's tokenizer '{place}' is gone")
            continue
        tokenizer = load_tokenizer(place, device)
        if tokenizer.fingerprint == state.get("tokenizer"):
            return tokenizer
        found.append(f"'{place or bundled_path()}' is not the tokenizer that the run was trained with")
        exit_code = CHECKPOINT_UNUSABLE
    raise RunError(f"{' and '.join(found)}; name its directory by --tokenizer DIR", exit_code)


def trained_index(run: Path, moved: Moved, path: str, state: dict[str, Any]) -> Index:
    """That of the training images.

    Raises:
        RunError: it is gone (66), or another one (78).
    """
    index = index_of(run, "index", moved.index, path)
    if index.fingerprint != state.get("index", index.fingerprint):
        raise RunError(
            f"'{index.location}' is not the index that the run was trained on; name that by --data", CHECKPOINT_UNUSABLE
        )
    return index


def index_of(run: Path, key: str, named: Path | None, path: str) -> Index:
    """Where the user names it, or where the settings do; or in the run, which may have been moved."""
    if named or Path(path).exists():
        return open_index(named or Path(path))
    own, option = run / INDICES / NAMES[key], {"index": "--data", "val_index": "--val"}[key]
    if not own.exists():
        raise DataError(f"the run's index '{path}' is gone; name it, or its images, by {option}")
    return open_index(own)


def check_run(run: Path) -> None:
    """
    Raises:
        RunError: it is no run directory (2).
    """
    if not (run / "config.yaml").is_file() and not (run / "checkpoints").is_dir():
        raise RunError(f"'{run}' is no run directory: it has no config.yaml", USAGE)


def is_finetuning(run: Path) -> bool:
    """Whether a run directory holds a fine-tuning, by its settings.

    Raises:
        RunError: as `open_run`.
    """
    check_run(run)
    try:
        values = read_saved(run / "config.yaml")
    except UNREADABLE:
        values = load_state(resolve_checkpoint(run)).get("config", {})
    return "augment" in values


def settings_of(run: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Those of `config.yaml`, or of the checkpoint where that cannot be read."""
    try:
        return read_saved(run / "config.yaml")
    except UNREADABLE as err:
        print(f"config.yaml cannot be read ({err}): settings are taken from the checkpoint", file=sys.stderr)
        return state.get("config", {})


def _with_a_pipeline(config: Config) -> Config:
    """Measured by the pipeline that it was trained by; where that is DALI, and not here, by torch."""
    if config.data.pipeline != "dali" or not (problem := why_no_dali()):
        return config
    print(f"pipeline: torch (the run's was dali: {problem}); figures differ a little", file=sys.stderr)
    return config.model_copy(update={"data": config.data.model_copy(update={"pipeline": "torch"})})


def measure(run: Trained, num_crops: int) -> Figures:
    """Loss on held-out images and on unseen crops of training images, beside that of a model that sees no image.

    Args:
        num_crops: looked at for each figure; with 1000 its error is some hundredths of a nat.
    """
    config, tokenizer, world = run.config, run.tokenizer, run.world
    train = evaluate(config, run.model, tokenizer, run.index, world, num_crops, Stop())
    val = evaluate(config, run.model, tokenizer, run.val_index, world, num_crops, Stop()) if run.val_index else train
    words = token_histogram(config, tokenizer, run.index, world, num_crops) if tokenizer else None
    return Figures(
        held_out=run.val_index is not None,
        loss=val.loss,
        accuracy=val.accuracy,
        baseline=unigram_baseline(words, val.histogram) if words is not None else None,
        own_baseline=unigram_baseline(val.histogram, val.histogram) if tokenizer else None,
        words_in_use=val.words_in_use if tokenizer else None,
        vocab_size=tokenizer.vocab_size if tokenizer else None,
        train_crops_loss=train.loss,
        train_crops_accuracy=train.accuracy,
        train_crops_baseline=unigram_baseline(words, train.histogram) if words is not None else None,
    )
