"""The same batches by NVIDIA DALI: on a GPU when there is one, else on the CPU.

DALI decodes the box alone and resizes it; order, box, flip and jitter come from `Plans`. Only bytes that
`decode.check` has passed go in: one bad file ends a DALI pipeline for good, and DALI has no limit on an image's size.
Threads read and check a batch while DALI works on the one before and the run trains on the one before that.
The GPU form of the graph has not been run yet.
"""

# DALI makes its operators and types while it is imported: pyright cannot see them
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from fastbeit.config.sections import Size
from fastbeit.data.batch import Batch, TokenViews
from fastbeit.data.decode import LUMA, Checked, check
from fastbeit.data.index.reader import Index
from fastbeit.data.plans import Drawn, Plans
from fastbeit.data.reading import Bad, Found, batch_of, plans_of, read_rows, read_step
from fastbeit.data.to_device import one_ahead
from fastbeit.data.views import BRIGHTNESS, SATURATION, Rule
from fastbeit.errors import RunError

FILTERS = {"bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}
# bytes a pixel of the largest image that each decoding thread sets aside, so that none has to stop the GPU for more:
# in proportion to what NVIDIA's training on ImageNet sets aside for its largest, of 5980 x 6430
DEVICE_BYTES, HOST_BYTES = 5.5, 3.7


def dali_batches(plans: Plans, rule: Rule, steps: range) -> Generator[Batch, None, None]:
    """Batches as `make_loader` gives them; images lie on the GPU when there is one."""
    with _threads(plans) as threads:
        views = Views(plans, rule, plans.batch_size // plans.world_size)
        loads = ((drawn, read_step(plans, drawn, _check, threads.map)) for drawn in map(plans.draw, steps))

        def begun() -> Iterator[tuple[Drawn, list[Found]]]:
            for drawn, checked in one_ahead(loads):
                found = list(checked)
                views.begin([one.made for one in found], plans_of(found))
                yield drawn, found

        for drawn, found in one_ahead(begun()):
            images, *token_images = views.end()
            yield batch_of(drawn, found, images, *(token_images or [None]))


def dali_token_views(
    plans: Plans, rule: Rule, items: Iterable[range], together: int
) -> Generator[TokenViews, None, None]:
    """Token views as `make_token_loader` gives them; images lie on the GPU when there is one."""
    num_crops, ((token_size, _),) = plans.data.num_crops, rule.views()
    with _threads(plans) as threads:
        views = Views(plans, rule, together * num_crops)
        loads = ((rows, read_rows(plans, rows, _check, threads.map)) for rows in items)

        def begun() -> Iterator[tuple[range, Bad, list[int]]]:
            for rows, attempts in one_ahead(loads):
                attempts = list(attempts)
                bad = [each for one in attempts for each in one.bad]
                checked: dict[int, Checked] = {one.place: one.made for one in attempts if not one.bad}
                if checked:
                    repeated = [image for image in checked.values() for _ in range(num_crops)]
                    views.begin(repeated, plans.augment_crops(rows)[list(checked)].reshape(-1))
                yield rows, bad, list(checked)

        for rows, bad, good in one_ahead(begun()):
            made = views.end()[0].unflatten(0, (len(good), num_crops)) if good else None
            images = torch.zeros(len(rows), num_crops, *token_size, 3, dtype=torch.uint8)
            if made is not None:
                images = images.to(made.device)
                images[good] = made
            yield TokenViews(rows, images, bad)


@contextmanager
def _threads(plans: Plans) -> Iterator[ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(max(1, plans.data.num_workers), "check")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def _check(data: bytes, size: Size, plan: Any) -> Checked:
    return check(data, size)


class Views:
    """Makes the views of batches of images, first in, first out; while `begin` has begun one, another can be made."""

    def __init__(self, plans: Plans, rule: Rule, batch_size: int) -> None:
        self._jitters_crop = rule.jitter_on == "crop"
        self._begun: deque[np.ndarray | None] = deque()
        on_gpu = torch.cuda.is_available()
        self._pipeline = _graph(
            views=list(rule.views()),
            decoder=_gpu_decoder(plans.index) if on_gpu else {"device": "cpu"},
            batch_size=batch_size,
            num_threads=max(1, plans.data.num_workers),
            device_id=torch.cuda.current_device() if on_gpu else None,
            prefetch_queue_depth=2,
            # else the first batch would wait for the second
            exec_pipelined=False,
        )
        self._pipeline.build()

    def begin(self, checked: list[Checked], plans: np.ndarray) -> None:
        """Begin with n images, by their [n] records of PLAN; at most two batches can be begun and not ended."""
        crop_box = plans["crop_box"].astype(np.int32)
        self._pipeline.feed_input("encoded", [np.frombuffer(image.encoded, np.uint8) for image in checked])
        self._pipeline.feed_input("anchor", crop_box[:, :2].copy())
        self._pipeline.feed_input("shape", crop_box[:, 2:].copy())
        self._pipeline.feed_input("flip", plans["flip"].astype(np.int32))
        self._pipeline.schedule_run()
        grey = None if self._jitters_crop else np.array([image.mean_grey for image in checked])
        self._begun.append(jitter_rounds(plans, grey) if np.any(plans["factors"] != 1) else None)

    def end(self) -> list[Tensor]:
        """The views of the batch that was begun first, [n, h, w, 3] uint8 each."""
        try:
            # copies, since DALI writes its next batch where this one lies
            views = [torch.from_dlpack(view.as_tensor()).clone() for view in self._pipeline.share_outputs()]
        except RuntimeError as err:
            raise RunError(f"DALI gave up on images that had been checked; take data.pipeline=torch: {err}") from err
        self._pipeline.release_outputs()
        rounds = self._begun.popleft()
        if rounds is None:
            return views
        return [jitter(view.permute(0, 3, 1, 2), rounds).permute(0, 2, 3, 1).contiguous() for view in views]


def _gpu_decoder(index: Index) -> dict[str, Any]:
    """
    Chroma as on the CPU, so that tokens are the same; `hw_decoder_load` stays DALI's own: more of it made the slowest
    batches slower.
    """
    height, width = int(index.heights.max()), int(index.widths.max())
    pixels = int((index.heights.astype(np.int64) * index.widths).max())
    return {
        "device": "mixed",
        "jpeg_fancy_upsampling": True,
        "device_memory_padding": int(DEVICE_BYTES * pixels),
        "host_memory_padding": int(HOST_BYTES * pixels),
        "preallocate_width_hint": width,
        "preallocate_height_hint": height,
    }


@pipeline_def
def _graph(views: list[tuple[Size, str]], decoder: dict[str, Any]) -> tuple[Any, ...]:
    """The graph: decode the box, resize it once a view, by the filter beside its size, flip."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    # `decode.check` has turned images with an EXIF orientation, and passes them on as PNM
    crop = fn.decoders.image_slice(
        encoded, anchor, shape, axes=(0, 1), output_type=types.RGB, adjust_orientation=False, **decoder
    )
    return tuple(
        fn.flip(fn.resize(crop, size=size, interp_type=FILTERS[name], antialias=True), horizontal=flip)
        for size, name in views
    )


def jitter_rounds(plans: np.ndarray, grey: np.ndarray | None) -> np.ndarray:
    """The drawn operations as numbers: in round r, pixel <- scale * pixel + luma * its grey + shift + mean * the mean.

    Args:
        plans: [n] records of `PLAN`.
        grey: [n] mean luma of the whole images, in [0, 255]; None: contrast takes that of the view, as it finds it.

    Returns:
        [n, 3 rounds, (scale, luma, shift, mean)] float64.
    """
    rounds = np.zeros((len(plans), 3, 4))
    for row, plan in enumerate(plans):
        brightness = 1.0
        for number, op in enumerate(plan["order"]):
            factor = plan["factors"][op]
            rounds[row, number, 0] = factor
            if op == BRIGHTNESS:
                brightness = factor
            elif op == SATURATION:
                rounds[row, number, 1] = 1 - factor
            elif grey is None:
                rounds[row, number, 3] = 1 - factor
            else:
                rounds[row, number, 2] = (1 - factor) * int(grey[row] * brightness + 0.5)
    return rounds


def jitter(images: Tensor, rounds: np.ndarray) -> Tensor:
    """`views.jitter` for [n, 3, h, w] uint8 images, on their device."""
    pixels = images.flatten(2).float()  # [n, 3, h w]
    for number in range(3):
        factors = torch.tensor(rounds[:, number, :, None, None], dtype=torch.float32).to(images.device)
        scale, luma, shift, mean = factors.unbind(1)  # [n, 1, 1]
        # sums of products, one operation at a time: the same bits on any number of threads
        if rounds[:, number, 1].any():
            red, green, blue = pixels.split(1, dim=1)
            shift = shift + (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]) * luma  # [n, 1, h w]
        if rounds[:, number, 3].any():
            # sums of whole numbers: exact in any order
            sums = pixels.view(images.shape).sum(3).sum(2, keepdim=True, dtype=torch.float64)
            red, green, blue = (sums / pixels.shape[2]).split(1, dim=1)
            shift = shift + mean * (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 0.5).floor().float()
        pixels.mul_(scale).add_(shift).clamp_(0, 255).floor_()
    return pixels.to(torch.uint8).view(images.shape)
