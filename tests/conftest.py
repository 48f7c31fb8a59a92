import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it when it decorates a kernel
if "OMP_NUM_THREADS" not in os.environ:
    # networks as small as those of the tests lose time when two threads wait for each other, on a busy machine most of
    # it; the commands that tests start inherit this
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
