"""Each kernel as its launcher launches it in a run of BEiT-B: what the compile gate and the predictions look at."""

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.kernels.compiled import Case


def cross_entropy_cases() -> Iterator[Case]:
    from fastbeit_kernels import cross_entropy as ce

    rows = dict(labels_ptr="*i64", row_loss_ptr="*fp32", row_correct_ptr="*i32")
    scalars = dict(grad_loss_ptr="*fp32", count_ptr="*fp32")
    options = ce.launch_options(ce.MAX_BLOCK)
    for dtype in ("bf16", "fp32"):
        for kernel in (ce._cross_entropy_fwd_kernel, ce._cross_entropy_fwd_loop_kernel):
            plain = dict(LABEL_SMOOTHING=0.0, SMOOTHING_PER_WORD=0.0, Z_LOSS=0.0)
            smoothed = dict(LABEL_SMOOTHING=0.1, SMOOTHING_PER_WORD=0.1 / ce.MAX_BLOCK, Z_LOSS=1e-4)
            variants = [("grad", plain), ("loss", plain), ("smooth", smoothed)]
            for variant, weights in variants if dtype == "bf16" else variants[:1]:
                constants = dict(IGNORE_INDEX=ce.IGNORE_INDEX, WITH_GRAD=variant != "loss", BLOCK_V=ce.MAX_BLOCK)
                gate: dict[str, Any] = dict(stores_bulk=variant != "loss", narrow_loads=2, narrow_stores=4)
                yield Case(kernel, variant, dtype, rows, constants | weights, options, **gate)
        yield Case(
            ce._cross_entropy_bwd_kernel, "grad", dtype, scalars, dict(BLOCK_N=ce.MAX_BLOCK), options, narrow_loads=2
        )


def masked_embed_cases() -> Iterator[Case]:
    import torch

    from fastbeit_kernels import masked_embed as me

    def make(kernel: Any, variant: str, dtype: str, types: dict, constants: dict, tiles: dict, **expected: Any):
        blocks = {name: size for name, size in tiles.items() if name.startswith("BLOCK")}
        options = {name: number for name, number in tiles.items() if name not in blocks}
        return Case(kernel, variant, dtype, types, constants | blocks, options, **expected)

    geometry = dict(S=197, K=768, RUN=48, ACROSS=14)  # 14 x 14 patches of 16 x 16 pixels
    source = dict(images_ptr="*u8", masked_ptr="*i1")
    sums = dict(masked_ptr="*i1", visible_ptr="*fp32", hidden_ptr="*fp32")
    names = "shift_ptr", "cls_token_ptr", "mask_token_ptr", "positions_ptr", "tokens_ptr"
    forward = source | dict.fromkeys(names, "*fp32")
    for dtype, kind in dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32).items():
        tiles = me.product_tiles(kind)
        for variant in ("relative", "absolute") if dtype == "bf16" else ("relative",):
            constants = geometry | dict(HAS_POSITIONS=variant == "absolute")
            # narrow: parameters, masks, and on sm_90 pixels, which Triton copies 64 bits at a time where wgmma takes
            # them from registers
            expected = dict(narrow_loads=9) if dtype == "fp32" else dict(narrow_loads=29, multiplies=True)
            yield make(me._masked_embed_fwd_kernel, variant, dtype, forward, constants, tiles, **expected)
        tiles, expected = me.sums_tiles(kind), dict(narrow_loads=4, stores_bulk=False, narrow_stores=2)
        yield make(me._masked_embed_bwd_sums_kernel, "grad", dtype, sums, {}, tiles, **expected)
        yield make(me._masked_embed_bwd_unfold_kernel, "grad", dtype, source, geometry, me.UNFOLD_TILES, narrow_loads=2)


def block_masks_cases() -> Iterator[Case]:
    from fastbeit_kernels import block_masks as bm

    names = "epoch_ptr", "sample_ptr", "masked_idx_ptr", "num_masked_ptr"
    types = {name: "*i64" for name in names} | dict(seed="i64")
    # nothing is bulk: a program reads two numbers, scatters 8 patches a thread and writes their count
    expected: dict[str, Any] = dict(loads_bulk=False, narrow_loads=2, stores_bulk=False, narrow_stores=9)
    for variant, side, num_masked, block in (("masks", 14, 75, 256), ("largest", 32, 400, 1024)):
        common = dict(M=num_masked, PURPOSE=bm.PURPOSE, BLOCK_N=block)
        rule = dict(H=side, W=side, MIN_BLOCK=16, LOG_ASPECT=math.log(0.3), ATTEMPTS=bm.ATTEMPTS)
        for kernel, shape in ((bm._block_masks_kernel, rule), (bm._random_masks_kernel, dict(N=side * side))):
            yield Case(kernel, variant, "i64", types, common | shape, bm.launch_options(block), **expected)


def cases() -> Iterator[Case]:
    yield from masked_embed_cases()
    yield from cross_entropy_cases()
    yield from block_masks_cases()
