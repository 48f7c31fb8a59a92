"""Says what of this machine a run can use, what not, why, and how to get it; and whether each kernel is right here."""

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
from fastbeit.tokenizer.disk import vocab_size_of
from fastbeit_kernels.backend import check_backend

PAPERS_WORDS = 8192  # of the paper's tokenizer
MAX_TEXT = 160  # characters of a reason, in the table; the JSON has it whole
WORDS = {"runs": "runs", "wrong": "DOES NOT RUN", "absent": "absent", "unused": "not used"}


def doctor(config: Config, num_outputs: int, output: Path | None) -> int:
    """Print the table; write it as JSON too, where `output` is given.

    Args:
        num_outputs: V visual words; for pixels the values of a patch.

    Returns:
        The exit code: done.

    Raises:
        ConfigError: something that the configuration asks for by name does not run.
        RunError: `output` cannot be written (73).
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
    return DONE


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
    if config.data.pipeline == "dali":
        asked["nvidia.dali"] = "data.pipeline=dali"
    for op, backend in dataclasses.asdict(kernels.by_op).items():
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
