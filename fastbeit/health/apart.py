"""Looks at things in a process of its own: what ends that process, or hangs, is named, and the others still have their
turn. There the kernels are interpreted where there is no card; Triton asks for that once, when it is imported."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastbeit.config.pretrain import Config
from fastbeit.files import read_records
from fastbeit.health.finding import Finding, one_line
from fastbeit.health.operators import operator, pairs_of
from fastbeit.health.packages import HOW_TO_GET, package

PATIENCE_S = 300  # that a process may take for all that is left


def names_of(config: Config) -> list[str]:
    """Each package, and each operator with each implementation."""
    return [*HOW_TO_GET, *(" ".join(pair) for pair in pairs_of(config))]


def look_at_all(names: list[str], config: Config, num_outputs: int, device: torch.device) -> list[Finding]:
    """A finding for each of `names_of`."""
    found: list[Finding] = []
    while len(found) < len(names):
        rest = names[len(found) :]
        asked = dict(names=rest, config=config.model_dump(mode="json"), num_outputs=num_outputs, device=str(device))
        new, why = answers_apart("fastbeit.health.apart", asked, device, PATIENCE_S)
        # none: the first one ended the process
        found += [Finding(**one) for one in new] or [
            Finding(rest[0], "wrong", why=why, fix=HOW_TO_GET.get(rest[0], ""))
        ]
    return found


def answers_apart(
    module: str, asked: dict[str, Any], device: torch.device, patience_s: float
) -> tuple[list[dict[str, Any]], str]:
    """Run `python -m MODULE FILE`, which reads what is asked from stdin and writes an answer a line into FILE.

    Returns:
        What it had answered when it ended; and how it ended, empty where that was well.
    """
    env = os.environ if device.type == "cuda" else {**os.environ, "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers"
        answers.touch()
        # a file, because packages print what they like
        alike = ["-S"] if sys.flags.no_site else []  # the packages that this process sees
        command = [sys.executable, *alike, "-m", module, str(answers)]
        options = dict(input=json.dumps(asked), env=env, capture_output=True, text=True, timeout=patience_s)
        try:
            ended = subprocess.run(command, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
            said = ended.stderr.strip().splitlines()[-1:]
            why = f"it ended the process with {ended.returncode}: {one_line(' '.join(said))}"
            is_well = ended.returncode == 0
        except subprocess.TimeoutExpired:
            why, is_well = f"it hangs: no answer in {patience_s} s", False
        # a line that the process's end cut short is passed over
        found, _ = read_records(answers)
        return found, "" if found and is_well else why


def main(answers: Path) -> None:
    """The process: what is asked on stdin, a finding a line into `answers`."""
    asked = json.load(sys.stdin)
    config, device = Config.model_validate(asked["config"]), torch.device(asked["device"])
    for name in asked["names"]:
        if name in HOW_TO_GET:
            found = package(name, config, device)
        else:
            op, backend = name.split()
            found = operator((op, backend), config, asked["num_outputs"], device)
        with answers.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        if device.type == "cuda":
            # a card that was led into an error stays so in this process: it ends here, and another goes on
            torch.cuda.synchronize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
