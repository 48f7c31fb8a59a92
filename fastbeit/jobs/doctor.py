"""Says what of this machine a run can use, what not, why, and how to get it; whether each kernel is right here; and,
asked to tune, what is fastest."""

import dataclasses
import json
from pathlib import Path

import torch

from fastbeit.config.pretrain import Config
from fastbeit.engine.ranks import device_of
from fastbeit.errors import CANNOT_CREATE, DONE, ConfigError, RunError, TokenizerError, writing
from fastbeit.files import write_whole
from fastbeit.health.apart import look_at_all, names_of
from fastbeit.health.cards import cards
from fastbeit.health.finding import Finding
from fastbeit.health.packages import python
from fastbeit.health.tuning import Timing, chosen, tune
from fastbeit.model.attention import attention_choice
from fastbeit.model.tuned import Choices, key_of, table_path, write_table
from fastbeit.tokenizer.disk import vocab_size_of
from fastbeit_kernels.backend import check_backend

PAPERS_WORDS = 8192  # of the paper's tokenizer
MAX_TEXT = 160  # characters of a reason, in the table; the JSON has it whole
OPTIMIZERS = {"apex_adam": "apex", "apex_lamb": "apex", "ds_cpu_adam": "deepspeed"}  # packages that they are of
WORDS = {"runs": "runs", "wrong": "DOES NOT RUN", "absent": "absent", "unused": "not used"}


def doctor(config: Config, num_outputs: int, output: Path | None, tunes: bool = False) -> int:
    """Print the table; write it as JSON too, where `output` is given.

    Args:
        num_outputs: V visual words; for pixels the values of a patch.
        tunes: time what runs here and is right, and keep what is fastest for runs of this configuration.

    Returns:
        The exit code: done.

    Raises:
        ConfigError: something that the configuration asks for by name does not run.
        RunError: `output`, or what was tuned, cannot be written (73).
    """
    device = _device(config)
    found = [python(), *cards(), *look_at_all(names_of(config), config, num_outputs, device)]
    asked = asked_by_name(config)
    found = [_as_in_a_run(one, asked, config, device) for one in found]
    print(table(found))
    if output:
        _write(output, found)
    wrong = [f"{asked[one.name]}: {one.why}; {one.fix}" for one in found if one.name in asked and one.state != "runs"]
    if wrong:
        raise ConfigError("\n".join(wrong))
    print("all that the configuration asks for by name runs here" if asked else "nothing is asked for by name")
    if tunes:
        timed = _tune(config, num_outputs, device, [one.name for one in found if one.state == "runs"])
        if output:
            _write(output, found + timed)
    return DONE


def _tune(config: Config, num_outputs: int, device: torch.device, right: list[str]) -> list[Finding]:
    """Time the choices, print them, and keep the fastest in the table that runs read; the rows, for JSON.

    As many ranks are assumed as the machine has cards: that, and the batch, say how many images one computes at once.
    """
    on_cuda = device.type == "cuda"
    num_ranks = torch.cuda.device_count() if on_cuda else 1
    key = key_of(config, num_outputs, num_ranks, device)
    what = ", ".join(f"{name} {value}" for name, value in key.items()) if on_cuda else "a try, at small shapes"
    print(f"\ntuning for {what}", flush=True)
    timed = tune(config, num_outputs, num_ranks, device, right)
    default = _default_attention(config, device, right)
    choices = chosen(timed, default)
    found = [_as_finding(one, choices, default) for one in timed]
    print(table(found))
    if not on_cuda:
        print("times of a CPU, and of Triton's interpreter, decide nothing: nothing is kept")
    elif any(one.ms is not None for one in timed):
        times = {f"{one.setting}={one.choice}": one.ms for one in timed if one.ms is not None}
        write_table(table_path(), key, choices, times)
        print(f"kept in '{table_path()}'; runs of these shapes take it where the configuration names nothing")
    return found


def _default_attention(config: Config, device: torch.device, right: list[str]) -> str:
    model = config.model
    shape = config.num_patches + 1, model.width // model.num_heads
    name, _ = attention_choice("auto", device, *shape, model.relative_position != "none")
    return name if f"attention {name}" in right else "sdpa"


def _as_finding(one: Timing, choices: Choices, default_attention: str) -> Finding:
    if not one.setting:
        return Finding("tuning", "wrong", why=one.why, fix="what was not timed stays as it is")
    is_default = one.choice == (default_attention if one.setting == "attention" else None)
    name = f"kernels.{one.setting}={'null' if one.choice is None else one.choice}"
    if one.ms is None:
        return Finding(name, "wrong", why=one.why)
    is_chosen = choices[one.setting] == one.choice
    words = ["the default"] * is_default + ["chosen"] * is_chosen
    return Finding(name, "runs", f"{one.ms:.3f} ms", ", ".join(words))


def num_outputs_of(config: Config) -> int:
    """As in a run, by the tokenizer's card; where there is none, the paper's."""
    if config.objective == "pixels":
        height, width = config.model.patch_size
        return 3 * height * width
    try:
        return vocab_size_of(config.tokenizer.path)
    except TokenizerError:
        return PAPERS_WORDS


def asked_by_name(config: Config) -> dict[str, str]:
    """What must run, by the name of its finding: the setting that says so."""
    kernels, asked = config.kernels, {}
    if config.engine.device == "cuda":
        asked["CUDA"] = "engine.device=cuda"
    if config.engine.name == "deepspeed":
        asked["deepspeed"] = "engine.name=deepspeed"
    if config.log.wandb:
        asked["wandb"] = f"log.wandb={config.log.wandb}"
    if config.optim.name in OPTIMIZERS:
        asked[OPTIMIZERS[config.optim.name]] = f"optim.name={config.optim.name}"
    if config.data.pipeline == "dali":
        asked["nvidia.dali"] = "data.pipeline=dali"
    for op, backend in kernels.by_op.implementations.items():
        if backend != "auto":
            asked[f"{op} {backend}"] = f"kernels.{op if getattr(kernels, op) else 'backend'}={backend}"
    return asked


def _device(config: Config) -> torch.device:
    try:
        return device_of(config.engine)
    except RunError:  # engine.device=cuda without a card: a row of the table says why
        return torch.device("cpu")


def _as_in_a_run(found: Finding, asked: dict[str, str], config: Config, device: torch.device) -> Finding:
    """A kernel that is right when it is interpreted is still refused by a run on a CPU that asks for it."""
    if found.name not in asked or found.state != "runs" or not found.name.endswith(" triton"):
        return found
    try:
        check_backend("triton", device)
    except ValueError as err:
        return dataclasses.replace(found, state="wrong", why=str(err), fix="or take auto")
    return found


def table(found: list[Finding]) -> str:
    """Columns of equal width; what is missing or wrong is told in the last one."""
    rows = [("what", "state", "version, or how", "why; how to get it")]
    for one in found:
        rows.append((one.name, WORDS[one.state], one.version, "; ".join(filter(None, (_short(one.why), one.fix)))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


def _write(output: Path, found: list[Finding]) -> None:
    with writing(f"--json: '{output}'", "choose another file", CANNOT_CREATE):
        write_whole(output, json.dumps([dataclasses.asdict(one) for one in found], indent=1) + "\n")
