"""What each kernel moves, beside the least that it must.

    TRITON_INTERPRET=1 python -m benchmarks.kernels.moved [--json FILE]

BEiT-B with fewer images than a run has, and as much fewer programs at a time: what is far apart in a run is so here.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import liger
from benchmarks.kernels.ops import DTYPE, Op, Shapes, cross_entropy_op, linear_cross_entropy_op, masked_embed_op
from benchmarks.kernels.traffic import Bytes, Traffic

SMS = 132  # of an H100
ROWS = Shapes(B=1)  # 75 rows of logits
LONG_ROWS = Shapes(B=1, M=8, V=65536)
IMAGES = Shapes(B=8)


class Moved(NamedTuple):
    """Of one part of a kernel's traffic, in bytes."""

    kernel: str
    part: str
    minimum: int
    unique: int
    requested: int
    scale: int  # how many times more images a run of BEiT-B has
    fixed: int  # of the minimum, what does not grow with them

    @property
    def ratio(self) -> float:
        return self.unique / self.minimum

    def in_a_run(self) -> "Moved":
        minimum, unique = (self.scale * (n - self.fixed) + self.fixed for n in (self.minimum, self.unique))
        return self._replace(minimum=minimum, unique=unique, requested=self.scale * self.requested, scale=1)


def resident(blocks: int, shapes: Shapes) -> int:
    """How many programs run at a time on a GPU that holds `blocks` an SM, as much fewer as there are fewer images."""
    return max(1, blocks * SMS * shapes.B // Shapes().B)


def traffic_of(op: Op, inputs: dict[str, Tensor], resident: int, once: tuple[str, ...] = ()) -> Traffic:
    """One forward and one backward."""
    leaves = [inputs[name].requires_grad_() for name in op.differentiable]
    with Traffic(resident, once) as traffic:
        out = op.contestants["ours"](**inputs)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    return traffic


def moved_by_cross_entropy(shapes: Shapes) -> Iterator[Moved]:
    """Rows of up to 8192 logits stay in registers; for longer ones the forward has another kernel."""
    op = cross_entropy_op(shapes, "triton")
    inputs = op.make_inputs("cpu", 0)
    minimum = _loss_minimum(inputs["labels"], shapes)
    traffic = traffic_of(op, inputs, resident(2, shapes))
    if shapes.V > 8192:
        forward = "_cross_entropy_fwd_loop_kernel"
        yield _moved(forward, "all", minimum, traffic.total(forward), shapes)
        return
    forward, backward = "_cross_entropy_fwd_kernel", "_cross_entropy_bwd_kernel"
    yield _moved(forward, "all", minimum, traffic.total(forward), shapes)
    yield _moved(backward, "all", op.num_bytes, traffic.total(backward), shapes)
    if liger.INSTALLED:
        with Traffic(resident(2, shapes)) as traffic, torch.no_grad():
            liger.cross_entropy(inputs["logits"].detach().requires_grad_(), inputs["labels"])
        kernel = "liger_cross_entropy_kernel"
        yield _moved(kernel, "all", minimum, traffic.total(kernel), shapes)


def moved_by_linear_cross_entropy(shapes: Shapes) -> Iterator[Moved]:
    """Its own kernel, which is that of the cross-entropy at work in place; the products are cuBLAS's."""
    op = linear_cross_entropy_op(shapes, "triton")
    inputs = op.make_inputs("cpu", 0)
    traffic, kernel = traffic_of(op, inputs, resident(2, shapes)), "_cross_entropy_fwd_kernel"
    yield _moved(kernel, "in place", _loss_minimum(inputs["labels"], shapes), traffic.total(kernel), shapes)


def _loss_minimum(labels: Tensor, shapes: Shapes) -> int:
    """Logits of labelled rows read, all gradients written; and of a row its label, loss and whether it is right."""
    row = shapes.V * DTYPE.itemsize
    return int((labels != -100).sum()) * row + shapes.R * (row + 8 + 4 + 4)


def moved_by_masked_embed(shapes: Shapes, show_all: bool = False) -> Iterator[Moved]:
    """With `show_all` pixels of masked patches are read too, which the minimum does not allow for."""
    op = masked_embed_op(shapes, "triton")
    inputs = op.make_inputs("cpu", 0)
    masked = inputs["masked"]
    pixels = int((~masked).sum()) * shapes.K
    once = "folded_ptr", "shift_ptr", "cls_token_ptr", "mask_token_ptr"
    if show_all:
        inputs = inputs | dict(masked=torch.zeros_like(masked))
    traffic = traffic_of(op, inputs, resident(3, shapes), once)
    tokens = shapes.B * shapes.S * shapes.D * DTYPE.itemsize
    weights = shapes.K * shapes.D * DTYPE.itemsize + 3 * shapes.D * 4
    sums = 2 * shapes.S * shapes.D * 4
    unfolded = shapes.B * shapes.S * shapes.K * DTYPE.itemsize
    forward, sum_up, unfold = (f"_masked_embed_{name}_kernel" for name in ("fwd", "bwd_sums", "bwd_unfold"))
    for kernel in (forward, unfold):
        yield _moved(kernel, "pixels", pixels, traffic.total(kernel, "images_ptr"), shapes)
    pixels += masked.numel()
    yield _moved(forward, "all", pixels + tokens + weights, traffic.total(forward), shapes, weights)
    yield _moved(sum_up, "all", tokens + masked.numel() + sums, traffic.total(sum_up), shapes, sums)
    yield _moved(unfold, "all", pixels + unfolded, traffic.total(unfold), shapes)


def _moved(kernel: str, part: str, minimum: int, count: Bytes, shapes: Shapes, fixed: int = 0) -> Moved:
    return Moved(kernel, part, minimum, count.unique, count.requested, Shapes().B // shapes.B, fixed)


def all_moved() -> Iterator[Moved]:
    yield from moved_by_cross_entropy(ROWS)
    yield from moved_by_cross_entropy(LONG_ROWS)
    yield from moved_by_linear_cross_entropy(ROWS)
    yield from moved_by_masked_embed(IMAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    rows = list(all_moved())
    print(f"{'kernel':33} {'part':9} {'minimum MB':>11} {'unique MB':>10} {'/ minimum':>10} {'asked of L2 MB':>15}")
    for row in rows:
        minimum, unique, requested = (n / 1e6 for n in (row.minimum, row.unique, row.requested))
        print(f"{row.kernel:33} {row.part:9} {minimum:11.2f} {unique:10.2f} {row.ratio:10.3f} {requested:15.2f}")
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
