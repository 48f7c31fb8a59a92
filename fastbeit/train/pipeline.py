"""Which pipeline a job decodes by: settled once, before anything is loaded, on all ranks alike.

It is what `data.pipeline` says; for `auto`, in this order: what the run began with; what the tokens on disk were made
by; torch. DALI's graph for a GPU has not run on one yet, so that nobody gets it without having asked for it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.read import saved_pipeline
from fastbeit.config.tokenizer import TokenizerTrainConfig
from fastbeit.data.loader import why_no_dali
from fastbeit.engine.ranks import World
from fastbeit.errors import ConfigError, RunError
from fastbeit.tokenizer.cache.reader import pipeline_of

C = TypeVar("C", Config, FinetuneConfig, TokenizerTrainConfig)


@dataclass(frozen=True)
class Choice:
    """A pipeline, and what decided for it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"pipeline: {self.name} ({self.reason})"


def settle_pipeline(config: C, world: World, run: Path | None, tokens: Path | None) -> tuple[C, Choice]:
    """The config with its pipeline by name, and the choice to be said; all ranks must call it.

    Args:
        run: the run directory, where there is one.
        tokens: the directory of stored tokens, where there is one, finished or not.

    Raises:
        RunError: the pipeline cannot be used here, or the ranks chose different ones; on all ranks.
    """
    choice, error = None, None
    try:
        choice = _choose(config, world.device, run, tokens)
    except RunError as err:
        if world.size == 1:
            raise
        error = str(err), err.exit_code
    told = list(enumerate(world.gather([(choice, error)])))
    for rank, (_, error) in told:
        if error:
            raise RunError(f"rank {rank}: {error[0]}", error[1])
    if len({choice.name for _, (choice, _) in told}) > 1:
        each = "; ".join(f"rank {rank}: {choice}" for rank, (choice, _) in told)
        raise ConfigError(f"the ranks chose different pipelines: {each}. Set data.pipeline, for all of them")
    assert choice
    data = config.data.model_copy(update={"pipeline": choice.name})
    return config.model_copy(update={"data": data}), choice


def _choose(
    config: Config | FinetuneConfig | TokenizerTrainConfig, device: torch.device, run: Path | None, tokens: Path | None
) -> Choice:
    begun = saved_pipeline(type(config), run / "config.yaml") if run else None
    made_by = pipeline_of(tokens) if tokens else None
    if config.data.pipeline != "auto":
        choice, instead = Choice(config.data.pipeline, "as data.pipeline says"), "data.pipeline=torch"
    elif begun:
        choice, instead = Choice(begun, f"auto: as the run in '{run}' began"), "begin another run, in another out"
    elif made_by:
        choice, instead = Choice(made_by, f"auto: as the tokens in '{tokens}' were made"), "make the tokens again"
    else:
        return _by_device(device)
    if choice.name == "dali" and (problem := why_no_dali()):
        raise ConfigError(f"{choice}, but {problem}; pip install 'fastbeit[gpu]', or {instead}")
    return choice


def _by_device(device: torch.device) -> Choice:
    if device.type != "cuda":
        return Choice("torch", "auto: engine.device=cpu" if torch.cuda.is_available() else "auto: no CUDA device")
    problem = why_no_dali()
    return Choice("torch", f"auto: no DALI, {problem}" if problem else "auto; data.pipeline=dali decodes on the GPU")
