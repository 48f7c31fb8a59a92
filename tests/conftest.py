import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it when it decorates a kernel


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
