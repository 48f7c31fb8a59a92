"""Tokenizers of each kind, small and with random weights, and the authors' own to compare with."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fastbeit.config.tokenizer import Architecture
from fastbeit.tokenizer.authors_vae import CustomizedArchitecture, CustomizedDecoder, CustomizedEncoder
from fastbeit.tokenizer.codebook import (
    CodebookArchitecture,
    CodebookDecoder,
    CodebookEncoder,
)
from fastbeit.tokenizer.dvae import Decoder, Encoder
from helpers.tiny import photo_folder

SMALL = CustomizedArchitecture(num_layers=2, hidden_dim=8, codebook_dim=6, vocab_size=24)
CHW, HWC = "chw", "hwc"


class OfficialVAE(nn.Module):
    """The authors' `DiscreteVAE`, from the description of its constructor, as far as encoding and decoding go."""

    class ResBlock(nn.Module):
        def __init__(self, dim: int):
            super().__init__()
            conv = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 1)
            self.net = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])

        def forward(self, x):
            return self.net(x) + x

    def __init__(self, num_tokens: int, codebook_dim: int, num_layers: int, hidden_dim: int):
        super().__init__()
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        down, up = [], []
        for i in range(num_layers):
            narrow, wide = (hidden_dim, hidden_dim) if i else (3, codebook_dim)
            down.append(nn.Sequential(nn.Conv2d(narrow, hidden_dim, 4, stride=2, padding=1), nn.ReLU()))
            down.append(self.ResBlock(hidden_dim))
            up.append(nn.Sequential(nn.ConvTranspose2d(wide, hidden_dim, 4, stride=2, padding=1), nn.ReLU()))
            up.append(self.ResBlock(hidden_dim))
        self.encoder = nn.Sequential(*down, nn.Conv2d(hidden_dim, num_tokens, 1))
        self.decoder = nn.Sequential(*up, nn.Conv2d(hidden_dim, 3, 1))

    def get_codebook_indices(self, images):
        return self.encoder(images).argmax(dim=1)

    def decode(self, ids):  # [B, h, w], which the authors' code makes of a square
        return self.decoder(self.codebook(ids).permute(0, 3, 1, 2))


def official_of(arch: CustomizedArchitecture, seed: int = 0) -> OfficialVAE:
    torch.manual_seed(seed)
    return OfficialVAE(arch.vocab_size, arch.codebook_dim, arch.num_layers, arch.hidden_dim)


def transplanted(official: OfficialVAE, arch: CustomizedArchitecture) -> tuple[CustomizedEncoder, CustomizedDecoder]:
    """Both nets with the tensors of the authors' file, divided by name."""
    encoder, decoder, state = CustomizedEncoder(arch), CustomizedDecoder(arch), official.state_dict()
    ours = {key for key in state if key.startswith("encoder.")}
    encoder.load_state_dict({key: state[key] for key in ours})
    decoder.load_state_dict({key: state[key] for key in state.keys() - ours})
    return encoder, decoder


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def photo(name: str, size: int) -> torch.Tensor:
    """A real photo, uint8 [1, size, size, 3]."""
    return torch.tensor(np.asarray(Image.open(photo_folder() / name).convert("RGB").resize((size, size))))[None]


def write_codebook(path: Path, order: str | None = HWC, **tensors: torch.Tensor) -> Path:
    metadata = {"order": order} if order else {"made_by": "a test"}
    save_file({key.replace("__", "."): value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def make_nets(kind: str) -> tuple[nn.Module, nn.Module]:
    """Small and random, of 24 words."""
    torch.manual_seed(1)
    if kind == "codebook":
        arch = CodebookArchitecture(vocab_size=24, patch_size=16, order=CHW, projected_dim=9)
        encoder, decoder = CodebookEncoder(arch), CodebookDecoder(arch)
        nn.init.normal_(encoder.codebook, std=0.3)
        return encoder, decoder
    if kind == "dalle":
        arch = Architecture(n_hid=8, n_init=8, vocab_size=24)
        encoder, decoder = Encoder(arch), Decoder(arch)
    else:
        encoder, decoder = transplanted(official_of(SMALL), SMALL)
    with torch.no_grad():
        # no word is likelier than another
        list(encoder.parameters())[-1].sub_(encoder(torch.rand(4, 3, 64, 64)).mean((0, 2, 3)))
    return encoder, decoder
