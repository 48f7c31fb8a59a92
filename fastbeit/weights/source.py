"""A file of a model's weights, opened: names and shapes at once, values when they are asked for.

safetensors                       names as they are
torch.save, zip or legacy         a state dict, alone or in a trainer's file: under `model`, `module`, `state_dict`,
                                  or `teacher` (DINO); read without running anything that it says
a directory                       config.json and preprocessor_config.json beside one of these
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastbeit.errors import DATA_MISSING, RunError
from fastbeit.weights.pickles import Malformed, Record, TensorSpec, shown
from fastbeit.weights.torchfile import open_torch

Shape = tuple[int, ...]
# where a trainer's file has its weights; the first that is there is taken, as the authors' loader does
WRAPPERS = ("model", "module", "state_dict", "teacher", "student")
FILES = ("model.safetensors", "pytorch_model.bin")  # of a directory, in this order
MAX_NAME, MAX_JSON_BYTES = 256, 1 << 22


class Source(NamedTuple):
    """Weights under someone's names."""

    file: Path
    shapes: dict[str, Shape]
    read: Callable[[Iterable[str]], dict[str, Tensor]]  # on the CPU, owned by the caller
    wrapper: str  # that the weights are under; empty: none
    beside: dict[str, str]  # what else the file holds, and why it is left out
    config: dict[str, Any]  # config.json of the same directory
    preprocessor: dict[str, Any]  # preprocessor_config.json, likewise


def open_source(path: Path) -> Source:
    """A file, or a directory with one.

    Raises:
        Malformed: it is damaged, holds no weights, or names what it may not; nothing was run.
        RunError: there is no such file (exit code 66).
        OSError: it cannot be read.
    """
    file = _file_in(path) if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"'{file}' is not there; give a file of weights, or a directory with one", DATA_MISSING)
    beside = {name: _json(file.with_name(name)) for name in ("config.json", "preprocessor_config.json")}
    opened = _open_safetensors if file.suffix == ".safetensors" else _open_torch
    return opened(file)._replace(config=beside["config.json"], preprocessor=beside["preprocessor_config.json"])


def _file_in(folder: Path) -> Path:
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        parts = sorted(folder.glob("*.index.json"))
        hint = f"its weights are in parts ({parts[0].name}): save them as one file" if parts else "give the file itself"
        raise Malformed(f"wants one of {', '.join(FILES)}, and has none; {hint}")
    return found


def _json(path: Path) -> dict[str, Any]:
    """Of another program, so of any content; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as err:
        raise Malformed(
            f"has a {path.name} beside it that cannot be read ({shown(str(err))}); mend or remove it"
        ) from None
    return found if isinstance(found, dict) else {}


def _open_safetensors(file: Path) -> Source:
    def read(names: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in names}

    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except SafetensorError as err:
        raise Malformed(f"is damaged or no safetensors file: {shown(str(err))}; download it again") from None
    return Source(file, _checked(shapes), read, "", {}, {}, {})


def _open_torch(file: Path) -> Source:
    opened = open_torch(file)
    wrapper, specs, beside = _unwrap(opened.value)

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        return opened.tensors({name: specs[name] for name in names})

    return Source(file, _checked({name: spec.shape for name, spec in specs.items()}), read, wrapper, beside, {}, {})


def _unwrap(value: Any) -> tuple[str, dict[str, TensorSpec], dict[str, str]]:
    """Name of what the weights are under, the weights, and what else there is."""
    if isinstance(value, Record):
        raise Malformed("is a whole module, not a state dict; save `model.state_dict()`")
    if not isinstance(value, dict):
        raise Malformed(f"wants a state dict, found {type(value).__name__}")
    wrapper = next((name for name in WRAPPERS if _is_state(value.get(name))), "")
    found = value[wrapper] if wrapper else value
    specs = {name: spec for name, spec in found.items() if isinstance(spec, TensorSpec)}
    beside = {_text(name): _reason(one, wrapper) for name, one in value.items() if wrapper and name != wrapper}
    beside |= {_text(name): "no tensor" for name in found if name not in specs}
    if not specs:
        held = ", ".join(_text(name) for name in list(value)[:8]) or "nothing"
        raise Malformed(f"wants tensors, alone or under {', '.join(WRAPPERS)}; it holds {held}")
    return wrapper, {_text(name): spec for name, spec in specs.items()}, beside


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(one, TensorSpec) for one in value.values())


def _reason(value: Any, wrapper: str) -> str:
    if _is_state(value):
        return f"other weights; those under '{wrapper}' are taken"
    return "of the training: no weights"


def _text(name: Any) -> str:
    return shown(name) if isinstance(name, str) else str(name)


def _checked(shapes: dict[str, Shape]) -> dict[str, Shape]:
    for name in shapes:
        if len(name) > MAX_NAME:
            raise Malformed(f"wants names of at most {MAX_NAME} letters for its tensors, found {shown(name)}")
    return shapes


def as_float(name: str, tensor: Tensor) -> Tensor:
    """float32 and finite, or an error that names it."""
    if not tensor.is_floating_point():
        raise Malformed(f"has {shown(name)} of {tensor.dtype}; weights are floating-point numbers: not such a model")
    if not tensor.isfinite().all():
        raise Malformed(f"is damaged: {shown(name)} holds NaN or infinity; download it again")
    return tensor.to(torch.float32)
