import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it when it decorates a kernel
if "OMP_NUM_THREADS" not in os.environ:
    # networks as small as those of the tests lose time when two threads wait for each other, on a busy machine most of
    # it; the commands that tests start inherit this
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if hasattr(signal, "SIGHUP"):
    # a suite that nohup starts would ignore it, and so would all that tests start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A figure or a table that is shown at the end, also by one of several processes."""
    return lambda text: request.node.user_properties.append(("said", text))


DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names that read, `R12-V8192-bf16`: a number with its argument's name, a dtype, the items of a dict."""
    if isinstance(val, torch.dtype):
        return DTYPES.get(val, str(val).removeprefix("torch."))
    if isinstance(val, bool | int | float):
        return f"{argname}{val}" if len(argname) == 1 else f"{argname}={val}"
    if isinstance(val, dict):
        return ",".join(f"{key}={value}" for key, value in val.items()) or f"no {argname}"
    if isinstance(val, tuple | list) and val and all(isinstance(one, int) for one in val):
        return f"{argname}={'x'.join(map(str, val))}"
    return None  # pytest's own


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties:
            if name == "said" and report.when == "call":
                terminalreporter.write_line(text)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def interpret_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter of Triton 3.6, which takes int() of an array with one element; NumPy 2.4 refuses that."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_mend)
