"""What the doctor finds of one thing."""

from dataclasses import dataclass
from typing import Literal

State = Literal["runs", "wrong", "absent", "unused"]


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table."""

    name: str
    state: State  # wrong: it is there and does not run, or gives wrong results; unused: nothing here can use it
    version: str = ""
    why: str = ""  # what was seen, in one line
    fix: str = ""  # how to get it, in one line


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def told(err: BaseException) -> str:
    """An exception in one line."""
    return f"{type(err).__name__}: {one_line(err) or 'no reason told'}"
