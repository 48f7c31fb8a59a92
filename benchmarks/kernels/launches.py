"""Each kernel as its launcher launches it in a run of BEiT-B: what the compile gate and the predictions look at."""

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from benchmarks.kernels.compiled import SHARED_LIMIT, TARGETS, Case


def cross_entropy_cases() -> Iterator[Case]:
    ce = import_module("fastbeit_kernels.cross_entropy")

    rows = dict(labels_ptr="*i64", row_loss_ptr="*fp32", row_correct_ptr="*i32")
    scalars = dict(grad_loss_ptr="*fp32", count_ptr="*fp32")
    options = ce.launch_options(ce.MAX_BLOCK)
    # Ampere to Hopper are launched with fewer registers a thread than others
    bounded = tuple(target for target in TARGETS if target[:-1] in ("sm_8", "sm_9"))
    others = tuple(target for target in TARGETS if target not in bounded)
    launches: dict[str, dict[str, Any]] = {
        "": dict(targets=others, options=ce.row_options(ce.MAX_BLOCK, (0, 0))),
        "-bounded": dict(targets=bounded, options=ce.row_options(ce.MAX_BLOCK, (9, 0))),
    }
    plain = dict(LABEL_SMOOTHING=0.0, SMOOTHING_PER_WORD=0.0, Z_LOSS=0.0)
    smoothed = dict(LABEL_SMOOTHING=0.1, SMOOTHING_PER_WORD=0.1 / ce.MAX_BLOCK, Z_LOSS=1e-4)
    for dtype in ("bf16", "fp32"):
        variants = [("grad", plain), ("loss", plain), ("smooth", smoothed)]
        for variant, weights in variants if dtype == "bf16" else variants[:1]:
            constants = dict(IGNORE_INDEX=ce.IGNORE_INDEX, WITH_GRAD=variant != "loss", BLOCK_V=ce.MAX_BLOCK)
            gate: dict[str, Any] = dict(stores_bulk=variant != "loss", narrow_loads=2, narrow_stores=4)
            for suffix, launch in launches.items():
                yield Case(
                    ce._cross_entropy_fwd_kernel, variant + suffix, dtype, rows, constants | weights, **launch, **gate
                )
            loop = ce._cross_entropy_fwd_loop_kernel
            yield Case(loop, variant, dtype, rows, constants | weights, options, **gate)
        yield Case(
            ce._cross_entropy_bwd_kernel, "grad", dtype, scalars, dict(BLOCK_N=ce.MAX_BLOCK), options, narrow_loads=2
        )


def masked_embed_cases() -> Iterator[Case]:
    import torch

    me = import_module("fastbeit_kernels.masked_embed")

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
    bm = import_module("fastbeit_kernels.block_masks")

    names = "epoch_ptr", "sample_ptr", "masked_idx_ptr", "num_masked_ptr"
    types = {name: "*i64" for name in names} | dict(seed="i64")
    # nothing is bulk: a program reads two numbers, scatters 8 patches a thread and writes their count
    expected: dict[str, Any] = dict(loads_bulk=False, narrow_loads=2, stores_bulk=False, narrow_stores=9)
    for variant, side, num_masked, block in (("masks", 14, 75, 256), ("largest", 32, 400, 1024)):
        common = dict(M=num_masked, PURPOSE=bm.PURPOSE, BLOCK_N=block)
        rule = dict(H=side, W=side, MIN_BLOCK=16, LOG_ASPECT=math.log(0.3), ATTEMPTS=bm.ATTEMPTS)
        for kernel, shape in ((bm._block_masks_kernel, rule), (bm._random_masks_kernel, dict(N=side * side))):
            yield Case(kernel, variant, "i64", types, common | shape, bm.launch_options(block), **expected)


def relative_attention_cases() -> Iterator[Case]:
    import torch

    ra = import_module("fastbeit_kernels.relative_attention")

    types = dict.fromkeys(("lse_ptr", "delta_ptr", "sums_ptr"), "*fp32") | dict(scale="fp32", scale_bits="fp32")
    heads, statistics = dict(H=12, K=64), dict(stores_bulk=False, narrow_stores=1)

    def make(kernel: Any, variant: str, dtype: str, constants: dict, tiles: dict, **expected: Any):
        blocks = {name: size for name, size in tiles.items() if name.isupper()}
        options = {name: number for name, number in tiles.items() if name not in blocks}
        return Case(kernel, variant, dtype, types, heads | constants | blocks, options, **expected)

    nvidia = tuple(target for target in TARGETS if target.startswith("sm_"))
    for dtype, kind in dict(bf16=torch.bfloat16, fp32=torch.float32).items():
        forward, keys, past = ra.forward_tiles(kind), ra.key_tiles(kind), dict(S_PAD=208, PAST=ra.LOWEST[kind])
        yield make(ra._relative_attention_bwd_delta_kernel, "grad", dtype, {}, ra.DELTA_TILES, **statistics)
        # narrow: statistics of rows, the bias where a tile's rows are short, on gfx942 what comes out of its products
        for targets, stores in ((nvidia, dict(narrow_stores=1)), (("gfx942",), dict(narrow_stores=11))):
            common: dict[str, Any] = stores | dict(multiplies=dtype != "fp32", narrow_loads=30, targets=targets)
            common |= dict(stores_bulk=targets == nvidia or dtype == "fp32")
            variant = targets[0] if len(targets) == 1 else "nvidia"
            yield make(ra._relative_attention_fwd_kernel, variant, dtype, past, forward, **common)
            yield make(ra._relative_attention_bwd_keys_kernel, variant, dtype, past, keys, **common)
        for shared in sorted({*SHARED_LIMIT.values()}):
            # as launched with so little shared memory, and on each chip that has so much
            targets = tuple(target for target in TARGETS if SHARED_LIMIT[target] == shared)
            tiles, block = ra.query_tiles(kind, shared), dict(S_PAD=208, IS_FIRST=True, BLOCK_J=256)
            common = dict(multiplies=dtype != "fp32", narrow_loads=8, narrow_stores=8, targets=targets)
            yield make(ra._relative_attention_bwd_queries_kernel, f"{shared >> 10}KiB", dtype, block, tiles, **common)


def cases() -> Iterator[Case]:
    yield from masked_embed_cases()
    yield from relative_attention_cases()
    yield from cross_entropy_cases()
    yield from block_masks_cases()
