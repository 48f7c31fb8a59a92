"""Which patches are hidden: blockwise or random masks of a batch, on its device, from (seed, epoch, sample) alone.

Blockwise (arXiv 2106.08254, Algorithm 1, as the authors' code draws it): while the budget, num_masked less the patches
masked so far, is not used up, attempt k = 0, 1, ... draws a block

    area = min_block + (budget - min_block) * u[k, 0]                    uniform; the bounds may be in reverse
    aspect = exp(log(min_aspect) - 2 * log(min_aspect) * u[k, 1])        log-uniform
    height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))                      halves to even
    top, left = floor(u[k, 2] * (H - height + 1)), floor(u[k, 3] * (W - width + 1))

and keeps it if height < H, width < W, and 1 to `budget` of its patches are not masked yet. ATTEMPTS in vain end a mask.
u[k] are the four Philox words of counter (k, PURPOSE, epoch, sample) under the key `seed`, times 2^-32.
Random: the num_masked patches with the smallest words, patch n having word n % 4 of counter (n // 4, PURPOSE, ...).

The arithmetic is in float64, so that kernel and reference round alike. Traffic: 16 bytes an image read, 8 * (M + 1)
written; a mask takes some 11 attempts.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit_kernels.backend import Backend, tl, triton, uses_triton
from fastbeit_kernels.philox import philox

PURPOSE = 4  # the counter's word that sets masks apart from a run's other random numbers
ATTEMPTS = 10  # draws for one block before the mask is left as it is
MAX_SIDE = 32  # of the grid of patches: what a program holds in registers
PATCH_BITS = tl.constexpr(10)  # of a patch's number in a sort key: MAX_SIDE * MAX_SIDE patches
TO_INTEGER = tl.constexpr(2.0**52)  # float64 has no fraction bits above: adding it rounds, halves to even
VALUES_PER_WARP = 256  # so that the official 14 x 14 take one warp, which meets no barrier
# attempts that the reference looks at in each round on the words of one Philox call: the first, when nearly all masks
# find blocks at once, and the others. Only a whole window of ATTEMPTS without a block ends a mask. Tuned at 256 masks.
FIRST_WINDOWS = (2, 2, 2, 3, ATTEMPTS)
LATER_WINDOWS = (ATTEMPTS, ATTEMPTS)
WORD = 64  # patches that the reference holds in an int64

# scalars as tensors, which PyTorch would make of each Python number
_ONE, _TWO, _FOUR, _EIGHT, _48 = torch.tensor((1, 2, 4, 8, 48), device="cpu").unbind()
_PAIRS, _NIBBLES, _BYTES, _SHORTS, _SUM_OF_SHORTS = torch.tensor(
    (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x00FF00FF00FF00FF, 0x0001000100010001), device="cpu"
).unbind()


class _Unfinished(NamedTuple):
    """The masks that still grow, n of B."""

    rows: Tensor  # [n] of the batch
    epoch: Tensor  # [n, 1]
    sample: Tensor  # [n, 1]
    free: Tensor  # [n, words] a bit each patch: not masked yet
    budget: Tensor  # [n, 1] patches that may still be masked
    attempt: Tensor  # [n, 1] the next to look at


def block_masks_reference(
    seed: int, epoch: Tensor, sample: Tensor, grid: tuple[int, int], num_masked: int, min_block: int, min_aspect: float
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch; arguments as in `block_masks`.

    A mask is a string of bits, in int64 words; a block is the bits of its rows that are in its columns too. All masks
    take a step at once, each to its next block. Waits for the device.
    """
    table, rows = _bit_table(grid).to(sample.device), torch.arange(len(sample), device=sample.device)
    free, attempt = table.new_full((len(sample), table.shape[1]), -1), torch.zeros_like(sample)[:, None]
    masks = _Unfinished(rows, epoch[:, None], sample[:, None], free.clone(), attempt + num_masked, attempt)
    windows = FIRST_WINDOWS
    while len(masks.rows):
        _add_blocks(masks, windows, seed, grid, table, min_block, min_aspect)
        free[masks.rows] = masks.free
        unfinished = masks.budget[:, 0].nonzero()[:, 0]
        masks = _Unfinished(*(t[unfinished] for t in masks))
        windows = LATER_WINDOWS
    bits = (free[:, :, None] >> torch.arange(WORD, device=free.device)) & _ONE  # [B, words, WORD]
    return _slots(bits.flatten(1)[:, : grid[0] * grid[1]] == 0, num_masked)


def _add_blocks(
    masks: _Unfinished,
    windows: tuple,
    seed: int,
    grid: tuple[int, int],
    table: Tensor,
    min_block: int,
    min_aspect: float,
) -> None:
    """Add up to a block in each window, in place; a finished mask is left with a budget of 0."""
    columns, used = torch.arange(sum(windows), device=table.device), torch.zeros_like(masks.attempt)
    side = table.new_tensor(grid, dtype=torch.float64).view(2, 1, 1)
    smallest, side_and_one = side.new_tensor(min_block), side + 1
    second_half = side.new_tensor((0, (grid[0] + 1) ** 2)).view(2, 1, 1)  # of the table
    page = _draws(seed, masks.attempt + columns, masks.epoch, masks.sample, min_aspect)
    for window in windows:
        draws = page.gather(2, (used + columns[:window]).expand(4, -1, -1))
        area, aspect, first = draws[0].mul_(masks.budget - smallest).add_(smallest), draws[1], draws[2:]
        size = torch.stack((area * aspect, area / aspect)).sqrt_().round_().minimum(side)  # [2, n, window]
        first.mul_(side_and_one - size).floor_()
        rows, cols = F.embedding(first.mul_(side_and_one).add_(size).add_(second_half).long(), table)
        fresh = rows.bitwise_and_(cols).bitwise_and_(masks.free[:, None])  # [n, window, words]
        gain = _popcount(fresh)
        found, which = ((gain > 0) & (gain <= masks.budget)).max(1, keepdim=True)  # [n, 1], the first that will do
        block = fresh.gather(1, which[:, :, None].expand(-1, -1, fresh.shape[2]))[:, 0]
        masks.free.bitwise_xor_(block.mul_(found))
        masks.budget.sub_(gain.gather(1, which).mul_(found))
        if window == ATTEMPTS:
            masks.budget.mul_(found)
        used += which.add_(_ONE).mul_(found)
    masks.attempt.add_(used)


def _draws(seed: int, attempt: Tensor, epoch: Tensor, sample: Tensor, min_aspect: float) -> Tensor:
    """[4, n, attempts] float64: for the area in [0, 1), the aspect itself, for top and left in [0, 1)."""
    words = philox(seed, attempt, attempt.new_tensor(PURPOSE), epoch, sample)
    log_aspect, scale = torch.tensor((math.log(min_aspect), 2.0**-32), dtype=torch.float64, device="cpu").unbind()
    draws = torch.stack(words).double().mul_(scale)
    draws[1].mul_(-log_aspect - log_aspect).add_(log_aspect).exp_()
    return draws


@lru_cache
def _bit_table(grid: tuple[int, int]) -> Tensor:
    """[(H + 1)^2 + (W + 1)^2, words] int64: bits of the patches in rows first to first + size - 1, then of columns.

    Ordered by first and size, each up to the side of the grid. No bit for a size that does not fit: the side and more.
    """
    num_words = -(-grid[0] * grid[1] // WORD)
    patch = torch.arange(num_words * WORD, device="cpu")
    spans = []
    for place, side in zip((patch // grid[1], patch % grid[1]), grid, strict=True):
        size = torch.arange(side + 1, device="cpu")[:, None]
        first = size[:, None]
        spans.append(((place >= first) & (place < first + size) & (size < side)).flatten(0, 1))
    bits = (torch.cat(spans) & (patch < grid[0] * grid[1])).view(-1, num_words, WORD)
    return (bits.long() << torch.arange(WORD, device="cpu")).sum(2)


def _popcount(words: Tensor) -> Tensor:
    """Bits that are set in the last dimension's words, 16 of them at most."""
    x = words - (words >> _ONE).bitwise_and_(_PAIRS)
    x = (x >> _TWO).bitwise_and_(_NIBBLES).add_(x.bitwise_and_(_NIBBLES))
    x = (x >> _FOUR).add_(x).bitwise_and_(_BYTES).sum(-1)  # up to 8 a byte and word: 128
    x = (x >> _EIGHT).bitwise_and_(_SHORTS).add_(x.bitwise_and_(_SHORTS))
    return x.mul_(_SUM_OF_SHORTS).bitwise_right_shift_(_48)


def _slots(mask: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """From [B, N] bool: the masked patches, then the others, each in row-major order, [B, num_slots]; how many, [B]."""
    patch = torch.arange(mask.shape[1], device=mask.device)
    rank = mask.cumsum(1)
    num_masked = rank[:, -1:]
    place = torch.where(mask, rank - 1, (patch - rank).add_(num_masked))
    slots = torch.empty_like(place).scatter_(1, place, patch.expand_as(place))
    return slots[:, :num_slots].contiguous(), num_masked[:, 0].clone()


def random_masks_reference(
    seed: int, epoch: Tensor, sample: Tensor, grid: tuple[int, int], num_masked: int
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch; arguments as in `random_masks`."""
    N = grid[0] * grid[1]
    patch = torch.arange(N, device=sample.device)
    counter = torch.arange(-(-N // 4), device=sample.device)
    words = torch.stack(philox(seed, counter, counter.new_tensor(PURPOSE), epoch[:, None], sample[:, None]), dim=2)
    keys = words.flatten(1)[:, :N] * N + patch  # of equal words the first patch's is smaller
    return _slots(keys <= keys.sort(1).values[:, num_masked - 1 : num_masked], num_masked)


@triton.jit
def _store_slots(
    mask,  # [BLOCK_N] int1
    offs_n,  # [BLOCK_N]
    masked_idx_ptr,  # [M] int64
    num_masked_ptr,  # scalar int64
    N: tl.constexpr,
    M: tl.constexpr,
):
    rank = tl.cumsum(mask.to(tl.int32), axis=0)
    num_masked = tl.sum(mask.to(tl.int32), axis=0)
    place = tl.where(mask, rank - 1, num_masked + offs_n - rank)
    tl.store(masked_idx_ptr + place, offs_n.to(tl.int64), mask=(place < M) & (offs_n < N))
    tl.store(num_masked_ptr, num_masked.to(tl.int64))


@triton.jit
def _block_masks_kernel(
    epoch_ptr,  # [B] int64
    sample_ptr,  # [B] int64
    masked_idx_ptr,  # [B, M] int64
    num_masked_ptr,  # [B] int64
    seed,
    H: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    MIN_BLOCK: tl.constexpr,
    LOG_ASPECT: tl.constexpr,  # log(min_aspect); an argument would be float32
    PURPOSE: tl.constexpr,
    ATTEMPTS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= H * W: a program owns a whole mask
):
    pid_b = tl.program_id(0).to(tl.int64)
    epoch = tl.load(epoch_ptr + pid_b).to(tl.uint32)
    sample = tl.load(sample_ptr + pid_b).to(tl.uint32)
    offs_n = tl.arange(0, BLOCK_N)
    row, col = offs_n // W, offs_n % W
    mask = offs_n < 0
    budget, attempt, in_vain = M, 0, 0
    while (budget > 0) & (in_vain < ATTEMPTS):
        word0, word1, word2, word3 = tl.philox(seed, attempt, PURPOSE, epoch, sample)  # pyright: ignore[reportGeneralTypeIssues]
        area = MIN_BLOCK + (budget - MIN_BLOCK) * (word0.to(tl.float64) * 2.0**-32)
        aspect = tl.exp(LOG_ASPECT + (-LOG_ASPECT - LOG_ASPECT) * (word1.to(tl.float64) * 2.0**-32))
        height = (tl.sqrt(area * aspect) + TO_INTEGER) - TO_INTEGER
        width = (tl.sqrt(area / aspect) + TO_INTEGER) - TO_INTEGER
        fits = (height < H) & (width < W)
        height, width = tl.where(fits, height, 0.0), tl.where(fits, width, 0.0)  # no block: it gains nothing
        top = tl.floor(word2.to(tl.float64) * 2.0**-32 * (H - height + 1)).to(tl.int32)
        left = tl.floor(word3.to(tl.float64) * 2.0**-32 * (W - width + 1)).to(tl.int32)
        in_rows = (row >= top) & (row < top + height.to(tl.int32))
        fresh = in_rows & (col >= left) & (col < left + width.to(tl.int32)) & (mask == 0)
        gain = tl.sum(fresh.to(tl.int32), axis=0)
        accepted = (gain > 0) & (gain <= budget)
        mask = mask | (fresh & accepted)
        budget -= tl.where(accepted, gain, 0)
        in_vain = tl.where(accepted, 0, in_vain + 1)
        attempt += 1
    _store_slots(mask, offs_n, masked_idx_ptr + pid_b * M, num_masked_ptr + pid_b, H * W, M)


@triton.jit
def _random_masks_kernel(
    epoch_ptr,  # [B] int64
    sample_ptr,  # [B] int64
    masked_idx_ptr,  # [B, M] int64
    num_masked_ptr,  # [B] int64
    seed,
    N: tl.constexpr,
    M: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= N: a program owns a whole mask
):
    pid_b = tl.program_id(0).to(tl.int64)
    epoch = tl.load(epoch_ptr + pid_b).to(tl.uint32)
    sample = tl.load(sample_ptr + pid_b).to(tl.uint32)
    offs_n = tl.arange(0, BLOCK_N)
    word0, word1, word2, word3 = tl.philox(seed, tl.arange(0, BLOCK_N // 4), PURPOSE, epoch, sample)  # pyright: ignore[reportGeneralTypeIssues]
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))  # 0, 1, 2, 3 of each counter
    keys = tl.where(offs_n < N, (words.to(tl.int64) << PATCH_BITS) | offs_n, 2**62)
    # the M-th smallest key, from its top bit down: the largest number that fewer than M keys are below
    threshold = tl.zeros([], tl.int64)
    for i in range(32 + PATCH_BITS):
        raised = threshold | (tl.full([], 1, tl.int64) << (31 + PATCH_BITS - i))
        threshold = tl.where(tl.sum((keys < raised).to(tl.int32), axis=0) < M, raised, threshold)
    _store_slots(keys <= threshold, offs_n, masked_idx_ptr + pid_b * M, num_masked_ptr + pid_b, N, M)


def launch_options(block: int) -> dict[str, int | bool]:
    """How a kernel whose programs hold `block` patches is launched."""
    # fused multiply-adds would round area and aspect otherwise than the reference
    return {"num_warps": max(1, block // VALUES_PER_WARP), "enable_fp_fusion": False}


# Both implementations are inside the op, because no tracer can follow the reference's loop. Neither op has a gradient
# or a FLOP formula: the results are integers, and the arithmetic is none that grows with them.
@torch.library.custom_op("fastbeit::block_masks", mutates_args=())
def _block_masks(
    epoch: Tensor,
    sample: Tensor,
    seed: int,
    height: int,
    width: int,
    num_masked: int,
    min_block: int,
    min_aspect: float,
    with_triton: bool,
) -> tuple[Tensor, Tensor]:
    if not with_triton:
        return block_masks_reference(seed, epoch, sample, (height, width), num_masked, min_block, min_aspect)
    masked_idx, counts = sample.new_empty(len(sample), num_masked), torch.empty_like(sample)
    block = triton.next_power_of_2(height * width)
    _block_masks_kernel[(len(sample),)](
        epoch_ptr=epoch,
        sample_ptr=sample,
        masked_idx_ptr=masked_idx,
        num_masked_ptr=counts,
        seed=seed,
        H=height,
        W=width,
        M=num_masked,
        MIN_BLOCK=min_block,
        LOG_ASPECT=math.log(min_aspect),
        PURPOSE=PURPOSE,
        ATTEMPTS=ATTEMPTS,
        BLOCK_N=block,
        **launch_options(block),
    )
    return masked_idx, counts


@torch.library.custom_op("fastbeit::random_masks", mutates_args=())
def _random_masks(
    epoch: Tensor, sample: Tensor, seed: int, height: int, width: int, num_masked: int, with_triton: bool
) -> tuple[Tensor, Tensor]:
    if not with_triton:
        return random_masks_reference(seed, epoch, sample, (height, width), num_masked)
    masked_idx, counts = sample.new_empty(len(sample), num_masked), torch.empty_like(sample)
    block = max(4, triton.next_power_of_2(height * width))  # a counter has four words
    _random_masks_kernel[(len(sample),)](
        epoch_ptr=epoch,
        sample_ptr=sample,
        masked_idx_ptr=masked_idx,
        num_masked_ptr=counts,
        seed=seed,
        N=height * width,
        M=num_masked,
        PURPOSE=PURPOSE,
        BLOCK_N=block,
        **launch_options(block),
    )
    return masked_idx, counts


@_block_masks.register_fake
@_random_masks.register_fake
def _(epoch: Tensor, sample: Tensor, seed: int, height: int, width: int, num_masked: int, *_) -> tuple[Tensor, Tensor]:
    return sample.new_empty(len(sample), num_masked), torch.empty_like(sample)


def block_masks(
    seed: int,
    epoch: Tensor,
    sample: Tensor,
    grid: tuple[int, int],
    num_masked: int,
    min_block: int = 16,
    min_aspect: float = 0.3,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Give each sample's blockwise mask: a function of (seed, epoch, sample), not of the batch they stand in.

    Args:
        seed: 64 bits.
        epoch, sample: [B] int64, contiguous, of which the lower 32 bits count.
        grid: patches down and across, up to 32 each.
        num_masked: M, the budget: at most so many patches are masked, possibly none.
        min_block: smallest area that is drawn for a block, in patches; may be above the budget.
        min_aspect: in (0, 1]; a block's aspect ratio lies between this and 1 / this.
        backend: "triton", "reference" (plain PyTorch), or "auto": "triton" on CUDA, else "reference".

    Returns:
        masked_idx [B, M] int64 and num_masked [B] int64, on the device of `sample`. The first num_masked[b] slots of
        image b are its masked patches in row-major order, the others its first unmasked ones. Nothing waits for the
        device, but for the reference on CUDA.

    Raises:
        ValueError: a shape, dtype, device, layout or setting is wrong.
    """
    _check("block_masks", epoch, sample, grid, num_masked)
    if min_block < 1:
        raise ValueError(f"block_masks wants min_block of at least 1; got {min_block}: BEiT's is 16")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"block_masks wants min_aspect in (0, 1]; got {min_aspect}: BEiT's is 0.3")
    with_triton = uses_triton(backend, sample.device)
    return _block_masks(epoch, sample, _signed(seed), *grid, num_masked, min_block, min_aspect, with_triton)


def random_masks(
    seed: int, epoch: Tensor, sample: Tensor, grid: tuple[int, int], num_masked: int, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Give each sample's mask of exactly `num_masked` patches, each as likely as another.

    Arguments, returns and errors as in `block_masks`.
    """
    _check("random_masks", epoch, sample, grid, num_masked)
    return _random_masks(epoch, sample, _signed(seed), *grid, num_masked, uses_triton(backend, sample.device))


def _signed(seed: int) -> int:
    """The int64 of the same 64 bits, which an op can take."""
    return (seed + 2**63) % 2**64 - 2**63


def _check(op: str, epoch: Tensor, sample: Tensor, grid: tuple[int, int], num_masked: int) -> None:
    if sample.ndim != 1 or epoch.shape != sample.shape:
        got = f"{tuple(epoch.shape)} and {tuple(sample.shape)}"
        raise ValueError(f"{op} wants epoch and sample [B]; got {got}: repeat an epoch that stands for all")
    if epoch.dtype != torch.int64 or sample.dtype != torch.int64:
        raise ValueError(f"{op} wants torch.int64; got epoch {epoch.dtype} and sample {sample.dtype}: call .long()")
    if epoch.device != sample.device:
        raise ValueError(f"{op} wants one device; got epoch on {epoch.device} and sample on {sample.device}")
    if not (epoch.is_contiguous() and sample.is_contiguous()):
        got = f"{epoch.stride()} and {sample.stride()}"
        raise ValueError(f"{op} wants contiguous epoch and sample; got strides {got}: call .contiguous()")
    if not all(1 <= side <= MAX_SIDE for side in grid):
        raise ValueError(f"{op} wants a grid of 1 to {MAX_SIDE} patches a side; got {tuple(grid)}: take larger patches")
    if not 1 <= num_masked <= grid[0] * grid[1]:
        got = f"{num_masked} for a grid of {grid[0]} x {grid[1]}"
        raise ValueError(f"{op} wants num_masked from 1 to the number of patches; got {got}: BEiT masks 40 %")
