"""The discrete VAE that the authors of BEiT trained themselves (Table 8; `--discrete_vae_type customized`).

Modules and parameters carry the names of the authors' file: the state dicts of encoder and decoder, put together, are
the one under its key `weights`. A quarter of the work of the DALL-E encoder at 112 x 112 pixels.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor, nn

from fastbeit.config.sections import Count, Section
from fastbeit.tokenizer.fast import TOGETHER, TOGETHER_ON_GPU
from fastbeit.tokenizer.frozen import Strided, in_fixed_batches, likeliest_words


class CustomizedArchitecture(Section):
    """Size of an encoder and its decoder; the defaults are those of the authors' loader."""

    num_layers: Count = Field(default=3, description="layers, each with a residual block; each halves the resolution")
    hidden_dim: Count = Field(default=256, description="channels of all of them")
    codebook_dim: Count = Field(default=512, description="channels of a word's embedding in the decoder")
    vocab_size: Count = Field(default=8192, description="visual words")

    @property
    def stride(self) -> int:
        """Pixels a token, down and across."""
        return 2**self.num_layers


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


Resample = type[nn.Conv2d] | type[nn.ConvTranspose2d]


def _layers(resample: Resample, num_in: int, width: int, num_out: int, num_layers: int) -> nn.Sequential:
    """Layers that halve or double the resolution, a residual block after each; then the 1 x 1 output."""
    layers: list[nn.Module] = []
    for n_in in [num_in] + [width] * (num_layers - 1):
        layers += [nn.Sequential(resample(n_in, width, 4, stride=2, padding=1), nn.ReLU()), ResBlock(width)]
    return nn.Sequential(*layers, nn.Conv2d(width, num_out, 1))


class CustomizedEncoder(nn.Module):
    """Pixels in [-1, 1], [B, 3, h, w], to logits over the words [B, V, h / stride, w / stride]."""

    def __init__(self, arch: CustomizedArchitecture):
        super().__init__()
        self.arch = arch
        self.encoder = _layers(nn.Conv2d, 3, arch.hidden_dim, arch.vocab_size, arch.num_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class CustomizedDecoder(nn.Module):
    """Word ids int64 [B, h, w] to pixels around [-1, 1], [B, 3, h * stride, w * stride]."""

    def __init__(self, arch: CustomizedArchitecture):
        super().__init__()
        self.arch = arch
        self.codebook = nn.Embedding(arch.vocab_size, arch.codebook_dim)
        self.decoder = _layers(nn.ConvTranspose2d, arch.codebook_dim, arch.hidden_dim, 3, arch.num_layers)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.codebook(ids).permute(0, 3, 1, 2))


class CustomizedVAE(Strided):
    """A frozen `Tokenizer`; `disk.load_tokenizer` makes one.

    Args:
        encoder: on the device where tokens are wanted.
        read_decoder: called once, when the first tokens are decoded.
        fingerprint: identifies the weights.
        dtype: of all layers but the last, which is computed in float32.
    """

    def __init__(
        self,
        encoder: CustomizedEncoder,
        read_decoder: Callable[[], CustomizedDecoder],
        fingerprint: str,
        dtype: torch.dtype = torch.float32,
    ):
        self.arch, self.fingerprint, self.dtype = encoder.arch, fingerprint, dtype
        self.vocab_size, self.stride = encoder.arch.vocab_size, encoder.arch.stride
        self._read_decoder = read_decoder
        *trunk, head = encoder.requires_grad_(False).eval().encoder
        assert isinstance(head, nn.Conv2d) and head.bias is not None
        self._trunk = nn.Sequential(*trunk).to(dtype)
        self._head, self.device = (head.weight.flatten(1), head.bias), head.weight.device

    @cached_property
    def _decoder(self) -> CustomizedDecoder:
        return self._read_decoder().requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        size = TOGETHER.get(self.device.type, TOGETHER_ON_GPU)
        return in_fixed_batches(self._tokens, self.checked_images(images), size)

    def _tokens(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        features = self._trunk(((pixels - 0.5) / 0.5).to(self.dtype)).permute(0, 2, 3, 1)  # [B, h, w, C]
        return likeliest_words(features.flatten(0, 2), *self._head).view(len(images), -1)

    @torch.no_grad()
    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        pixels = self._decoder(self.checked_ids(ids, grid)) * 0.5 + 0.5
        return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
