"""What the doctor says of cards; a card is made up, where there is none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbeit.health import cards as module
from fastbeit.health.cards import cards
from fastbeit.health.finding import Finding


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A PyTorch for CUDA 13, a driver, and a card if there is one."""

    def machine(**card: Any) -> list[Finding]:
        monkeypatch.setattr(module, "driver_version", lambda: "580.1")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(card))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(**card))
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        monkeypatch.setattr(module.nccl, "version", lambda: (2, 28, 9))
        return cards()

    return machine


def test_a_card_is_told_with_what_drives_it(machine):
    found = machine(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    assert [one.name for one in found] == ["driver", "CUDA", "cuDNN", "NCCL", "card 0"]
    assert {one.state for one in found} == {"runs"}
    assert [one.version for one in found] == [
        "580.1",
        "13.0",
        "91900",
        "2.28.9",
        "NVIDIA H100, 80 GiB, compute capability 9.0",
    ]


def test_an_old_card_is_told(machine):
    found = machine(name="Tesla T4", total_memory=15 * 2**30, major=7, minor=5)[-1]
    assert found.state == "wrong" and found.why == "older than 8.0: no Triton kernels, no bfloat16"


def test_a_driver_that_does_not_serve_pytorch_is_told_with_the_reason(machine, monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system\nis too old (found version 12020)")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    cuda = machine()[1]
    assert cuda.state == "wrong"
    assert cuda.why == "RuntimeError: The NVIDIA driver on your system is too old (found version 12020)"


@pytest.mark.parametrize("driver, fix", [("580.1", "pip install the build for CUDA"), (None, "engine.device=cpu")])
def test_a_pytorch_without_cuda_is_told(driver: str | None, fix: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    first, cuda = cards()
    assert (first.state == "runs") == bool(driver)
    assert cuda.state == "absent" and fix in cuda.fix
