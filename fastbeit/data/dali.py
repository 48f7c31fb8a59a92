"""The same batches by NVIDIA DALI: on a GPU when there is one, else on the CPU.

DALI decodes the box alone and resizes it; order, box, flip and jitter come from `Plans` (design D1). Only bytes that
`decode.check` has passed go in: one bad file ends a DALI pipeline for good, and DALI has no limit on an image's size.
The GPU form of the graph has not been run yet.
"""

# DALI makes its operators and types while it is imported: pyright cannot see them
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from fastbeit.data.decode import check
from fastbeit.data.plans import Batch, Plans
from fastbeit.data.views import Size, jitter, jitter_rounds


def dali_batches(plans: Plans, token_size: Size | None, steps: range) -> Generator[Batch, None, None]:
    """Batches as `make_loader` gives them; images lie on the GPU when there is one."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    pipeline = _views(
        sizes=[plans.data.image_size] + ([token_size] if token_size else []),
        batch_size=plans.batch_size // plans.world_size,
        num_threads=max(1, plans.data.num_workers),
        device_id=device,
        prefetch_queue_depth=1,
    )
    pipeline.build()
    for step in steps:
        drawn = plans.draw(step)
        checked = list(plans.load(drawn, check))
        box = drawn.plans["box"].astype(np.int32)
        pipeline.feed_input("encoded", [np.frombuffer(image.encoded, np.uint8) for image in checked])
        pipeline.feed_input("anchor", box[:, :2].copy())
        pipeline.feed_input("shape", box[:, 2:].copy())
        pipeline.feed_input("flip", drawn.plans["flip"].astype(np.int32))
        views = [_to_torch(view).permute(0, 3, 1, 2) for view in pipeline.run()]
        if np.any(drawn.plans["factors"] != 1):
            rounds = jitter_rounds(drawn.plans, np.array([image.mean_grey for image in checked]))
            views = [jitter(view, rounds) for view in views]
        images, *token_images = (view.permute(0, 2, 3, 1).contiguous() for view in views)
        yield drawn.batch(images, *(token_images or [None]))


@pipeline_def
def _views(sizes: list[Size]) -> tuple[Any, ...]:
    """The graph: decode the box, resize it once a view, flip."""
    on_gpu = torch.cuda.is_available()
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    # what is not upright comes as PNM, turned
    crop = fn.decoders.image_slice(
        encoded,
        anchor,
        shape,
        axes=(0, 1),
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
    )
    filters = types.INTERP_CUBIC, types.INTERP_LANCZOS3
    return tuple(
        fn.flip(fn.resize(crop, size=size, interp_type=interp, antialias=True), horizontal=flip)
        for size, interp in zip(sizes, filters, strict=False)
    )


def _to_torch(view: Any) -> Tensor:
    """A copy, [n, h, w, 3]: DALI overwrites its own buffer in the next run."""
    return torch.from_dlpack(view.as_tensor()).clone()
