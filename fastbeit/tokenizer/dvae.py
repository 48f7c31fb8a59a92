"""The DALL-E discrete VAE: images to visual tokens and back (section 2.1; arXiv 2102.12092, appendix A).

Modules and parameters carry the names of OpenAI's release, so that a state dict of either loads into the other, at any
width and vocabulary.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.config.tokenizer import Architecture

Kernels = tuple[int, int, int, int]
NamedModule = tuple[str, nn.Module]
LOGIT_LAPLACE_EPS = 0.1  # keeps mapped pixels away from 0 and 1, where the logit is infinite (A.3)


def map_pixels(pixels: Tensor) -> Tensor:
    """[0, 1] to [eps, 1 - eps]."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * pixels + LOGIT_LAPLACE_EPS


def unmap_pixels(pixels: Tensor) -> Tensor:
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return ((pixels - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kernel: int):
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.w, std=(n_in * kernel**2) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, kernels: Kernels, post_gain: float):
        super().__init__()
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        layers: list[NamedModule] = []
        for i, kernel in enumerate(kernels):
            layers += [(f"relu_{i + 1}", nn.ReLU()), (f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))]
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = _sequence(layers)
        self.post_gain = post_gain

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


def _sequence(layers: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _groups(arch: Architecture, n_in: int, widths: list[int], kernels: Kernels, resample: str) -> Iterator[NamedModule]:
    """Groups of blocks, with a change of resolution between one and the next."""
    for group, width in enumerate(widths):
        n_ins = [n_in] + [width] * (arch.n_blk_per_group - 1)
        layers: list[NamedModule] = [
            (f"block_{block + 1}", Block(n_in, width, kernels, arch.post_gain)) for block, n_in in enumerate(n_ins)
        ]
        if group < len(widths) - 1:
            change = nn.MaxPool2d(2) if resample == "pool" else nn.Upsample(scale_factor=2, mode="nearest")
            layers.append((resample, change))
        yield f"group_{group + 1}", _sequence(layers)
        n_in = width


class Encoder(nn.Module):
    """Mapped pixels [B, 3, h, w] to logits over the words [B, V, h / stride, w / stride]."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.blocks = _sequence(
            [
                ("input", Conv2d(3, arch.n_hid, 7)),
                *_groups(arch, arch.n_hid, arch.widths, (3, 3, 3, 1), "pool"),
                ("output", _sequence([("relu", nn.ReLU()), ("conv", Conv2d(arch.widths[-1], arch.vocab_size, 1))])),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    """One-hot or soft words [B, V, h, w] to location and log-scale of each pixel [B, 6, h * stride, w * stride]."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        self.blocks = _sequence(
            [
                ("input", Conv2d(arch.vocab_size, arch.n_init, 1)),
                *_groups(arch, arch.n_init, arch.widths[::-1], (1, 3, 3, 3), "upsample"),
                ("output", _sequence([("relu", nn.ReLU()), ("conv", Conv2d(arch.n_hid, 6, 1))])),
            ]
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(z)

    def decode_words(self, ids: Tensor) -> Tensor:
        """The same of word ids int64 [B, h, w]: a one-hot word takes one column of the first convolution."""
        first, *rest = self.blocks
        assert isinstance(first, Conv2d)
        x = F.embedding(ids, first.w.flatten(1).T) + first.b
        return nn.Sequential(*rest)(x.permute(0, 3, 1, 2))


def to_mapped(images: Tensor) -> Tensor:
    """Images uint8 [B, h, w, 3] as an encoder wants them: float32 [B, 3, h, w], mapped, channels last in memory."""
    return map_pixels(images.permute(0, 3, 1, 2).float() / 255)


def one_hot(ids: Tensor, vocab_size: int) -> Tensor:
    """Word ids int64 [B, h, w] as a decoder wants them: float32 [B, V, h, w], channels last in memory."""
    words = torch.zeros(*ids.shape, vocab_size, device=ids.device)
    return words.scatter_(-1, ids[..., None], 1.0).permute(0, 3, 1, 2)


def to_images(stats: Tensor) -> Tensor:
    """A decoder's output [B, 6, h, w] as images uint8 [B, h, w, 3]."""
    pixels = unmap_pixels(torch.sigmoid(stats[:, :3].float()))
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).contiguous()
