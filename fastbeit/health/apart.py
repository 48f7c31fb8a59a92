"""Looks at things in a process of its own: what ends that process, or hangs, is named, and the others still have their
turn. There the kernels are interpreted where there is no card; Triton asks for that once, when it is imported."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from fastbeit.config.pretrain import Config
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
        new, why = _in_a_process(names[len(found) :], config, num_outputs, device)
        # none: the first one ended the process
        found += new or [Finding(names[len(found)], "wrong", why=why, fix=HOW_TO_GET.get(names[len(found)], ""))]
    return found


def _in_a_process(
    names: list[str], config: Config, num_outputs: int, device: torch.device
) -> tuple[list[Finding], str]:
    """What was found before the process ended, and how it ended."""
    asked = dict(names=names, config=config.model_dump(mode="json"), num_outputs=num_outputs, device=str(device))
    env = os.environ if device.type == "cuda" else {**os.environ, "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "findings"
        answers.touch()
        # a file, because packages print what they like
        alike = ["-S"] if sys.flags.no_site else []  # the packages that this process sees
        command = [sys.executable, *alike, "-m", "fastbeit.health.apart", str(answers)]
        options = dict(input=json.dumps(asked), env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        try:
            ended = subprocess.run(command, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
            said = ended.stderr.strip().splitlines()[-1:]
            why = f"it ended the process with {ended.returncode}: {one_line(' '.join(said))}"
        except subprocess.TimeoutExpired:
            why = f"it hangs: no answer in {PATIENCE_S} s"
        return [Finding(**json.loads(line)) for line in answers.read_text().splitlines()], why


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
