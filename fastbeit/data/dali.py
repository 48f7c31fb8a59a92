"""The same batches by NVIDIA DALI: on a GPU when there is one, else on the CPU.

DALI decodes the box alone and resizes it; order, box, flip and jitter come from `Plans` (design D1). Only bytes that
`decode.check` has passed go in: one bad file ends a DALI pipeline for good, and DALI has no limit on an image's size.
The GPU form of the graph has not been run yet.
"""

# DALI makes its operators and types while it is imported: pyright cannot see them
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from fastbeit.data.decode import Checked, check
from fastbeit.data.plans import Batch, Plans, TokenViews
from fastbeit.data.views import Size, jitter, jitter_rounds

TOKEN_FILTER = types.INTERP_LANCZOS3


def dali_batches(plans: Plans, token_size: Size | None, steps: range) -> Generator[Batch, None, None]:
    """Batches as `make_loader` gives them; images lie on the GPU when there is one."""
    sizes = [(plans.data.image_size, types.INTERP_CUBIC)] + ([(token_size, TOKEN_FILTER)] if token_size else [])
    pipeline = _build(sizes, plans.batch_size // plans.world_size, plans.data.num_workers)
    for step in steps:
        drawn = plans.draw(step)
        images, *token_images = _run(pipeline, list(plans.load(drawn, check)), drawn.plans)
        yield drawn.batch(images, *(token_images or [None]))


def dali_token_views(
    plans: Plans, token_size: Size, items: Iterable[range], together: int
) -> Generator[TokenViews, None, None]:
    """Token views as `make_token_loader` gives them; images lie on the GPU when there is one."""
    num_views = plans.data.views
    pipeline = _build([(token_size, TOKEN_FILTER)], together * num_views, plans.data.num_workers)
    for rows in items:
        drawn, bad = plans.augment_views(rows), []
        checked: dict[int, Checked] = dict(plans.load_valid(rows, check, bad))
        images = torch.zeros(len(rows), num_views, *token_size, 3, dtype=torch.uint8)
        if checked:
            good = list(checked)
            repeated = [image for image in checked.values() for _ in range(num_views)]
            (views,) = _run(pipeline, repeated, drawn[good].reshape(-1))
            images = images.to(views.device)
            images[good] = views.view(len(good), *images.shape[1:])
        yield TokenViews(rows, images, bad)


def _build(sizes: list[tuple[Size, Any]], batch_size: int, num_workers: int) -> Any:
    pipeline = _views(
        sizes=sizes,
        batch_size=batch_size,
        num_threads=max(1, num_workers),
        device_id=torch.cuda.current_device() if torch.cuda.is_available() else None,
        prefetch_queue_depth=1,
    )
    pipeline.build()
    return pipeline


def _run(pipeline: Any, checked: list[Checked], plans: np.ndarray) -> list[Tensor]:
    """The views of some images, [n, h, w, 3] uint8 each, by their [n] records of PLAN."""
    box = plans["box"].astype(np.int32)
    pipeline.feed_input("encoded", [np.frombuffer(image.encoded, np.uint8) for image in checked])
    pipeline.feed_input("anchor", box[:, :2].copy())
    pipeline.feed_input("shape", box[:, 2:].copy())
    pipeline.feed_input("flip", plans["flip"].astype(np.int32))
    views = [_to_torch(view).permute(0, 3, 1, 2) for view in pipeline.run()]
    if np.any(plans["factors"] != 1):
        rounds = jitter_rounds(plans, np.array([image.mean_grey for image in checked]))
        views = [jitter(view, rounds) for view in views]
    return [view.permute(0, 2, 3, 1).contiguous() for view in views]


@pipeline_def
def _views(sizes: list[tuple[Size, Any]]) -> tuple[Any, ...]:
    """The graph: decode the box, resize it once a view, by the filter beside its size, flip."""
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
    return tuple(
        fn.flip(fn.resize(crop, size=size, interp_type=interp, antialias=True), horizontal=flip)
        for size, interp in sizes
    )


def _to_torch(view: Any) -> Tensor:
    """A copy, [n, h, w, 3]: DALI overwrites its own buffer in the next run."""
    return torch.from_dlpack(view.as_tensor()).clone()
