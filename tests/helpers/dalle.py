"""Files as OpenAI released them: whole modules of the dall-e package, of any size, with random values."""

from pathlib import Path
from typing import Any

import dall_e
import torch
from torch import Tensor, nn

from fastbeit.config.tokenizer import Architecture
from fastbeit.tokenizer.dvae import Decoder, Encoder

FORMATS = {"zip": True, "legacy": False}
TINY = Architecture(n_hid=8, n_init=8, vocab_size=32)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Biases too: they are 0 at first and would hide a wrong one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.ndim == 4 else 1
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    return net


def official(arch: Architecture) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the dall-e package; below its narrowest with other values in the same modules."""
    nets = (
        dall_e.Encoder(n_hid=max(64, arch.n_hid), vocab_size=max(512, arch.vocab_size)),
        dall_e.Decoder(n_hid=max(64, arch.n_hid), vocab_size=max(512, arch.vocab_size), n_init=arch.n_init),
    )
    for net, ours in zip(nets, (Encoder(arch), Decoder(arch)), strict=True):
        for name, parameter in ours.named_parameters():
            net.get_parameter(name).data = parameter.data
        randomise(net)
    return nets


def save(value: Any, path: Path, format: str = "zip") -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=FORMATS[format])
    return path


def random_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def official_input(images: Tensor) -> Tensor:
    """What ToTensor and map_pixels give: float, channels first."""
    return dall_e.map_pixels(images.permute(0, 3, 1, 2).contiguous().float() / 255)


def official_tokens(encoder: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder(official_input(pixels)).argmax(1).flatten(1)
