"""How much memory a computation takes: bytes of the tensors alive at once, seen inside ops too.

Deterministic, on any device, and on tensors that have no memory (meta, FakeTensor); temporaries within a PyTorch
operation are not seen.

    python -m benchmarks.memory --plan CONFIG [--ranks N]     what optim.accumulate=auto would choose, predicted
"""

import argparse
import sys
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbeit.config.pretrain import Config
from fastbeit.config.read import load_config
from fastbeit.engine.fitting import RESERVE, fewest
from fastbeit.engine.memory import footprint

CARDS_GB = 24, 40, 80
# of a card's memory: what the driver keeps for itself, the CUDA context, and OpenAI's tokenizer; estimates
USABLE, TAKEN_BYTES = 0.98, 2**30
VOCAB_SIZE, STRIDE = 8192, 8  # OpenAI's tokenizer: words, and pixels of its view a token


class InsideOps(TorchDispatchMode):
    """Looks inside an op of the kernels: its launcher runs as plain Python, so that each PyTorch call it makes is seen.

    Under FakeTensor, and to any other mode, an op is one opaque call.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.name in OPDEFS:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError


class PeakMemory(InsideOps):
    """Counts bytes that are allocated while it is on; `peak` is the most that were alive after an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _key(t) not in given:
                storage = t.untyped_storage()
                self.alive[_key(t)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.alive.values()))
        return out


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def plan(config: Config, num_ranks: int) -> str:
    """Micro-batches and peaks for bf16 on CUDA, one rank a card, in the lines of a config's header."""
    images = config.optim.batch_size // num_ranks
    down, across = config.grid
    found = footprint(
        config, num_outputs=VOCAB_SIZE, token_size=(down * STRIDE, across * STRIDE), num_ranks=num_ranks, itemsize=2
    )
    lines = [f"Memory, predicted for {num_ranks} rank(s) with {images} images each, a rank a card:"]
    for card in CARDS_GB:
        room = int((USABLE - RESERVE) * card * 2**30) - TAKEN_BYTES
        count = fewest(images, found, room)
        peak = found.peak(images // count)
        fits = f"peak {peak / 2**30:.1f} GiB" if peak <= room else f"does not fit: {peak / 2**30:.1f} GiB"
        lines.append(f"  {card} GB: {count} micro-batch(es) of {images // count}, {fits}")
    return "\n".join(f"# {line}" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description="Memory of a run, predicted.")
    parser.add_argument("--plan", required=True, metavar="CONFIG", help="as for `fastbeit pretrain`")
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="one a card (8)")
    args = parser.parse_args(argv)
    print(plan(load_config(args.plan, []), args.ranks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
