"""Any codebook of patches, as k-means or a VQ makes one: a patch's token is the word nearest to it.

    token = argmin_v |z - codebook[v]|^2,  z = x  or  z = projection.weight x + projection.bias

x holds the pixels of a square of p x p in [0, 1], laid out as `order` says: "chw", all of red, then green, then blue,
row by row; or "hwc", pixel by pixel. Of words that are equal the first is taken.

`fastbeit tokenizer import FILE.safetensors -o DIR` reads a file with

    codebook           [V, C]       C = 3 p p without a projection
    projection.weight  [C, 3 p p]   optional: PCA, or the linear patch embedding of a VQ; what is subtracted from pixels
    projection.bias    [C]          first, or divides them, goes into these two
    decoder.weight     [3 p p, C]   optional, with a projection: a word's pixels are decoder.weight word + decoder.bias
    decoder.bias       [3 p p]      without it: the pixels nearest to mid grey that the projection maps to the word

and the metadata {"order": "chw" or "hwc"}; "patch_size" there is checked against the shapes.
"""

from collections.abc import Callable
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastbeit.config.sections import Count, Section
from fastbeit.errors import TokenizerError
from fastbeit.tokenizer.fast import TOGETHER, TOGETHER_ON_GPU
from fastbeit.tokenizer.frozen import Strided, in_fixed_batches, likeliest_words

MAX_VOCAB = 1 << 16  # 16 bits a token; a cache of tokens holds one word fewer, and marks bad images with it
GREY = 0.5
PIXEL_LIMITS = -1.0, 2.0  # a word far outside of [0, 1] was made for pixels of another scale


class CodebookArchitecture(Section):
    vocab_size: int = Field(ge=1, le=MAX_VOCAB, description="visual words")
    patch_size: Count = Field(description="pixels a token, down and across")
    order: Literal["chw", "hwc"] = Field(description="how a patch's pixels follow one another in a vector")
    projected_dim: int = Field(default=0, ge=0, description="features that words are compared in; 0: pixels")

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def dim(self) -> int:
        """Features of a word."""
        return self.projected_dim or self.patch_dim


class CodebookEncoder(nn.Module):
    """Words, and the projection from the pixels of a patch [..., 3 p p] to what they are compared in [..., C]."""

    def __init__(self, arch: CodebookArchitecture):
        super().__init__()
        self.arch = arch
        self.codebook = nn.Parameter(torch.zeros(arch.vocab_size, arch.dim))
        self.projection = nn.Linear(arch.patch_dim, arch.dim) if arch.projected_dim else nn.Identity()

    def forward(self, patches: Tensor) -> Tensor:
        return self.projection(patches)


class CodebookDecoder(nn.Module):
    """Words [..., C] to the pixels of a patch [..., 3 p p]."""

    def __init__(self, arch: CodebookArchitecture):
        super().__init__()
        self.arch = arch
        self.decoder = nn.Linear(arch.dim, arch.patch_dim) if arch.projected_dim else nn.Identity()

    def forward(self, words: Tensor) -> Tensor:
        return self.decoder(words)


class CodebookTokenizer(Strided):
    """A frozen `Tokenizer`; `disk.load_tokenizer` makes one.

    Args:
        encoder: on the device where tokens are wanted.
        read_decoder: called once, when the first tokens are decoded.
        fingerprint: identifies the weights.
        dtype: not used: distances are compared in float32, since rounded ones would choose other words.
    """

    dtype = torch.float32

    def __init__(
        self,
        encoder: CodebookEncoder,
        read_decoder: Callable[[], CodebookDecoder],
        fingerprint: str,
        dtype: torch.dtype = torch.float32,
    ):
        self.arch, self.fingerprint = encoder.arch, fingerprint
        self.vocab_size, self.stride = encoder.arch.vocab_size, encoder.arch.patch_size
        self._encoder, self._read_decoder = encoder.requires_grad_(False).eval(), read_decoder
        words = encoder.codebook
        self.device = words.device
        # -|z - w|^2 / 2 less the term that all words share, around their mean: smaller numbers, less is rounded away
        self._mean = words.double().mean(0).float()
        self._words = words - self._mean
        self._bias = -self._words.double().square().sum(1).float() / 2
        self._first_alike = _first_alike(words)

    @cached_property
    def _decoder(self) -> CodebookDecoder:
        return self._read_decoder().requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        size = TOGETHER.get(self.device.type, TOGETHER_ON_GPU)
        return in_fixed_batches(self._tokens, self.checked_images(images), size)

    def _tokens(self, images: Tensor) -> Tensor:
        patches = to_patches(images, self.arch).float() / 255
        features = self._encoder(patches.flatten(0, 2)) - self._mean
        return self._first_alike[likeliest_words(features, self._words, self._bias)].view(len(images), -1)

    @torch.no_grad()
    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        patches = self._decoder(self._encoder.codebook[self.checked_ids(ids, grid)])
        return to_images((patches.clamp(0, 1) * 255).round().byte(), self.arch)


def to_patches(images: Tensor, arch: CodebookArchitecture) -> Tensor:
    """Images [B, h, w, 3] as patches [B, h / p, w / p, 3 p p]."""
    size = arch.patch_size
    squares = images.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)  # [B, h / p, w / p, y, x, c]
    return (squares.permute(0, 1, 2, 5, 3, 4) if arch.order == "chw" else squares).flatten(3)


def to_images(patches: Tensor, arch: CodebookArchitecture) -> Tensor:
    """The inverse of `to_patches`."""
    size = arch.patch_size
    if arch.order == "chw":
        squares = patches.unflatten(3, (3, size, size)).permute(0, 1, 2, 4, 5, 3)
    else:
        squares = patches.unflatten(3, (size, size, 3))
    return squares.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _first_alike(words: Tensor) -> Tensor:
    """For each word the first that is equal to it: the order of a sum may make equal scores differ."""
    group = torch.unique(words, dim=0, return_inverse=True)[1]
    index = torch.arange(len(words), device=words.device)
    return torch.full_like(index, len(words)).scatter_reduce_(0, group, index, "amin")[group]


def import_codebook(path: Path) -> tuple[CodebookEncoder, CodebookDecoder]:
    """Read a file of someone else's, laid out as this module says, to be saved by `disk.save_tokenizer`.

    Raises:
        TokenizerError: what the file lacks, has too much of, or has in another shape.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as err:
        raise TokenizerError(f"'{path}' is no safetensors file: {err}") from None
    try:
        arch = _architecture(tensors, metadata)
    except ValueError as err:
        raise TokenizerError(f"'{path}': {err}") from None
    tensors = {key: value.float() for key, value in tensors.items()}
    if arch.projected_dim:
        tensors.setdefault("projection.bias", torch.zeros(arch.dim))
        if "decoder.weight" not in tensors:
            tensors |= _back_projection(tensors["projection.weight"], tensors["projection.bias"])
        tensors.setdefault("decoder.bias", torch.zeros(arch.patch_dim))
    encoder, decoder = CodebookEncoder(arch), CodebookDecoder(arch)
    for net in (encoder, decoder):
        net.load_state_dict({key: tensors[key] for key in net.state_dict()})
    return encoder, decoder


def _architecture(tensors: dict[str, Tensor], metadata: dict[str, str]) -> CodebookArchitecture:
    """
    Raises:
        ValueError: the tensors are no codebook, or not one that can be used.
    """
    codebook, projection = tensors.get("codebook"), tensors.get("projection.weight")
    if codebook is None or codebook.ndim != 2 or not codebook.numel():
        raise ValueError(f"wants a tensor 'codebook' [V, C]; found {_shapes(tensors) or 'no tensor at all'}")
    vocab_size, dim = codebook.shape
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"codebook has {vocab_size} words; {MAX_VOCAB} are the most")
    patch_dim = dim if projection is None else projection.shape[-1]
    patch_size = isqrt(patch_dim // 3)
    stated = metadata.get("patch_size", str(patch_size))
    if 3 * patch_size**2 != patch_dim or stated != str(patch_size):
        raise ValueError(
            f"{'codebook' if projection is None else 'projection.weight'} has {patch_dim} columns; patches of p x p "
            f"pixels want 3 p p, and the metadata says patch_size {metadata.get('patch_size', 'nothing')}"
        )
    order = metadata.get("order")
    if order not in ("chw", "hwc"):
        raise ValueError(
            f"the metadata wants order 'chw' (all of red, green, blue) or 'hwc' (pixel by pixel); found {order!r}; "
            "write it: safetensors.torch.save_file(tensors, path, metadata={'order': 'chw'})"
        )
    arch = CodebookArchitecture(
        vocab_size=vocab_size, patch_size=patch_size, order=order, projected_dim=0 if projection is None else dim
    )
    _check_tensors(tensors, arch)
    return arch


def _check_tensors(tensors: dict[str, Tensor], arch: CodebookArchitecture) -> None:
    with torch.device("meta"):
        wanted = _shapes(CodebookEncoder(arch).state_dict() | CodebookDecoder(arch).state_dict())
    for key, found in _shapes(tensors).items():
        if wanted.get(key) != found:
            raise ValueError(f"{key} wants {wanted.get(key, 'not to be there')}, found {found}")
        if not tensors[key].is_floating_point() or not tensors[key].isfinite().all():
            raise ValueError(f"{key} wants finite floats; found {tensors[key].dtype}, or NaN or infinity among them")
    if "decoder.bias" in tensors and "decoder.weight" not in tensors:
        raise ValueError("decoder.bias wants decoder.weight beside it; found none")
    low, high = (x.item() for x in tensors["codebook"].aminmax())
    if not arch.projected_dim and not PIXEL_LIMITS[0] <= low <= high <= PIXEL_LIMITS[1]:
        raise ValueError(f"codebook wants pixels in [0, 1]; found {low:g} to {high:g}; scale it, by 1 / 255 for bytes")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in tensors.items()}


def _back_projection(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """A decoder for a projection without one: what the projection cannot see stays grey."""
    inverse = torch.linalg.pinv(weight.double())  # [3 p p, C]
    grey = torch.full((weight.shape[1],), GREY, dtype=torch.float64)
    offset = grey - inverse @ (weight.double() @ grey + bias)
    return {"decoder.weight": inverse.float(), "decoder.bias": offset.float()}
