"""Triton's own Philox, to compare with."""

import triton
import triton.language as tl


@triton.jit
def philox_kernel(
    counter_ptr,  # [4, n] int64, each a 32-bit word
    words_ptr,  # [4, n] int64
    seed,
    n,
    BLOCK: tl.constexpr,  # >= n
):
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    c0 = tl.load(counter_ptr + offs, mask=mask, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + n + offs, mask=mask, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * n + offs, mask=mask, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * n + offs, mask=mask, other=0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(words_ptr + offs, w0.to(tl.int64), mask=mask)
    tl.store(words_ptr + n + offs, w1.to(tl.int64), mask=mask)
    tl.store(words_ptr + 2 * n + offs, w2.to(tl.int64), mask=mask)
    tl.store(words_ptr + 3 * n + offs, w3.to(tl.int64), mask=mask)
