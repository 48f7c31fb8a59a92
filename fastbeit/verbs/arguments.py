"""Arguments that several verbs have in common."""

import argparse
import os
from pathlib import Path

from fastbeit.config.arguments import one_config
from fastbeit.config.pretrain import Config
from fastbeit.config.read import JOBS, S, load_config, shipped_configs


def path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def read_config(names: list[str], settings: list[str], model: type[S] = Config) -> S:
    return load_config(one_config(names, list(shipped_configs(model)), JOBS.get(model, "pretrain")), settings, model)


def add_config(parser: argparse.ArgumentParser) -> None:
    """For the help alone: `parse` takes settings out before."""
    parser.add_argument("config", nargs="*", metavar="CONFIG [key=value ...]", help="as for `fastbeit pretrain`")
