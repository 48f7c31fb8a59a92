"""The graph that DALI runs, on a GPU when there is one, else on the CPU: views of batches of checked images.

DALI decodes the box alone and resizes it; order, box, flip and jitter come from `Plans`. One image that it does not
take ends a pipeline for good: `restart` then builds the next. The GPU form of the graph has not been run yet.
"""

# DALI makes its operators and types while it is imported: pyright cannot see them
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from fastbeit.config.sections import Size
from fastbeit.data.decode import LUMA, Checked
from fastbeit.data.index.reader import Index
from fastbeit.data.plans import Plans
from fastbeit.data.to_device import move
from fastbeit.data.views import BRIGHTNESS, SATURATION, Rule

FILTERS = {"bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}
# bytes a pixel of the largest image that each decoding thread sets aside, so that none has to stop the GPU for more:
# in proportion to what NVIDIA's training on ImageNet sets aside for its largest, of 5980 x 6430
DEVICE_BYTES, HOST_BYTES = 5.5, 3.7
MAX_ERROR = 400  # characters


class DaliError(Exception):
    """DALI could not make a batch; nothing more can be done with its pipeline."""


@dataclass(frozen=True)
class Given:
    """Images that go into DALI together."""

    rows: list[int]  # of the index
    checked: list[Checked]
    plans: np.ndarray  # [n] records of PLAN


class Views:
    """Makes the views of batches of images, first in, first out; while `begin` has begun one, another can be made."""

    def __init__(self, plans: Plans, rule: Rule, batch_size: int) -> None:
        self._jitters_crop = rule.jitter_on == "crop"
        self._begun: deque[Given] = deque()
        self._problem: DaliError | None = None
        on_gpu = torch.cuda.is_available()
        self._options: dict[str, Any] = dict(
            views=list(rule.views()),
            decoder=_gpu_decoder(plans.index) if on_gpu else {"device": "cpu"},
            batch_size=batch_size,
            num_threads=max(1, plans.data.num_workers),
            device_id=torch.cuda.current_device() if on_gpu else None,
            prefetch_queue_depth=2,
            # else the first batch would wait for the second
            exec_pipelined=False,
        )
        self._pipeline: Any = self._build()

    def _build(self) -> Any:
        pipeline: Any = _graph(**self._options)
        pipeline.build()
        return pipeline

    def restart(self) -> list[Given]:
        """Build the pipeline again; gives what had been begun and not ended, in order, of which nothing is left."""
        left = list(self._begun)
        self._begun.clear()
        # the old one goes before the new one takes its memory
        self._pipeline = self._problem = None
        try:
            self._pipeline = self._build()
        except Exception as err:
            raise _dali_error(err) from err
        return left

    def begin(self, given: Given) -> None:
        """Begin with n images, of which there may be none; at most two batches can be begun and not ended."""
        self._begun.append(given)
        if not given.checked or self._problem:
            return
        crop_box = given.plans["crop_box"].astype(np.int32)
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(image.encoded, np.uint8) for image in given.checked])
            self._pipeline.feed_input("anchor", crop_box[:, :2].copy())
            self._pipeline.feed_input("shape", crop_box[:, 2:].copy())
            self._pipeline.feed_input("flip", given.plans["flip"].astype(np.int32))
            self._pipeline.schedule_run()
        except Exception as err:
            # of this batch or of the one before it: `end` says so
            self._problem = _dali_error(err)

    def end(self) -> list[Tensor]:
        """The views of the batch that was begun first, [n, h, w, 3] uint8 each; without images, no views.

        Raises:
            DaliError: DALI failed at this batch, or at one that was begun after it; all of them are still begun.
        """
        given = self._begun[0]
        if not given.checked:
            self._begun.popleft()
            return []
        if self._problem:
            raise self._problem
        try:
            outputs = self._pipeline.share_outputs()
        except Exception as err:
            self._problem = _dali_error(err)
            raise self._problem from err
        # copies, since DALI writes its next batch where this one lies, as soon as it is released
        views = [torch.from_dlpack(view.as_tensor()).clone() for view in outputs]
        if views[0].is_cuda:
            torch.cuda.current_stream(views[0].device).synchronize()
        self._pipeline.release_outputs()
        self._begun.popleft()
        if not np.any(given.plans["factors"] != 1):
            return views
        grey = None if self._jitters_crop else np.array([image.mean_grey for image in given.checked])
        rounds = jitter_rounds(given.plans, grey)
        return [jitter(view.permute(0, 3, 1, 2), rounds).permute(0, 2, 3, 1).contiguous() for view in views]

    def make(self, given: Given) -> list[Tensor]:
        """The views of a batch, where no other is begun; errors as in `end`."""
        self.begin(given)
        return self.end()


def _dali_error(err: Exception) -> DaliError:
    # of many lines, most of which quote our own
    return DaliError(" ".join(str(err).split())[:MAX_ERROR])


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
    factors = move(torch.from_numpy(rounds.astype(np.float32)), images.device)[..., None, None]
    for number in range(3):
        scale, luma, shift, mean = factors[:, number].unbind(1)  # [n, 1, 1]
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
