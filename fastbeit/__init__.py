"""fastbeit pre-trains BEiT: a ViT that predicts the visual tokens of masked patches (arXiv 2106.08254)."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"
API = "load", "pretrain", "finetune"  # of `fastbeit.api`, which loads torch, and so is imported when it is asked for

# Threads that wait for work sleep. OpenMP's default is to spin, which takes the cores from whoever else has work: two
# small runs on two cores then make a third to a sixtieth of the steps that one makes. OpenMP reads this when it is
# loaded, with torch, hence here; what the user set stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    if name in API:
        return getattr(importlib.import_module("fastbeit.api"), name)
    raise AttributeError(f"module 'fastbeit' has no attribute '{name}'; it has {', '.join(API)}")


def __dir__() -> list[str]:
    return [*globals(), *API]
