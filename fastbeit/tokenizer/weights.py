"""A tokenizer on disk: `dvae.safetensors` and its card `dvae.json`. Written atomically, read strictly, no pickle."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastbeit.config import Section
from fastbeit.errors import CANNOT_WRITE, CHECKPOINT_UNUSABLE, RunError
from fastbeit.files import aside, put_in_place, sha256
from fastbeit.tokenizer.dvae import Architecture, Decoder, DiscreteVAE, Encoder

WEIGHTS, CARD = "dvae.safetensors", "dvae.json"
FORMAT = 1
Net = TypeVar("Net", bound=nn.Module)


class TokenizerError(RunError):
    """A tokenizer directory cannot be used: exit code 78."""

    def __init__(self, message: str) -> None:
        super().__init__(message, CHECKPOINT_UNUSABLE)


class Card(Section):
    """What `dvae.json` holds."""

    format: int = Field(ge=FORMAT, le=FORMAT, description="version of this layout")
    architecture: Architecture
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of dvae.safetensors")
    origin: dict[str, Any] = Field(default={}, description="where the weights come from, for the reader")


def save_tokenizer(path: Path, encoder: Encoder, decoder: Decoder | None = None, origin: dict[str, Any] | None = None):
    """Write a tokenizer directory; a reader sees the old one, the new one, or an error, never a mixture.

    Args:
        decoder: None: the tokenizer can encode, not decode.
        origin: facts for the reader of the card: command, data, licence.

    Raises:
        RunError: the directory cannot be written (exit code 74).
    """
    nets = {"encoder": encoder} | ({"decoder": decoder} if decoder else {})
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, net in nets.items()
        for key, value in net.state_dict().items()
    }
    weights, card = path / WEIGHTS, path / CARD
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside(weights))
        content = Card(
            format=FORMAT, architecture=encoder.arch, sha256=sha256(aside(weights)), origin=origin or {}
        ).model_dump_json(indent=2)
        aside(card).write_text(content + "\n")
        put_in_place(weights)
        put_in_place(card)
    except (OSError, SafetensorError) as err:
        raise RunError(f"tokenizer cannot be written to '{path}': {err}", CANNOT_WRITE) from err


def load_tokenizer(path: Path, device: torch.device | str = "cpu") -> DiscreteVAE:
    """Read a tokenizer directory; of the decoder only when it is first used.

    Raises:
        TokenizerError: a file is missing, damaged, or does not hold exactly the tensors of its architecture.
    """
    path = Path(path)
    card = _read_card(path)
    found = sha256(path / WEIGHTS)
    if found != card.sha256:
        raise TokenizerError(
            f"'{path / WEIGHTS}' wants sha256 {card.sha256[:16]}..., as {CARD} says; found {found[:16]}...: "
            "the file was damaged or replaced; copy the directory again, or make it again"
        )
    encoder = _read_net(Encoder, "encoder", card.architecture, path, device)
    return DiscreteVAE(encoder, lambda: _read_net(Decoder, "decoder", card.architecture, path, device), found)


def _read_card(path: Path) -> Card:
    for name in (CARD, WEIGHTS):
        if not (path / name).is_file():
            raise TokenizerError(
                f"'{path}' wants {CARD} and {WEIGHTS}; {name} is not there; make them with `fastbeit tokenizer train`"
            )
    try:
        return Card.model_validate_json((path / CARD).read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise TokenizerError(f"'{path / CARD}': {place}: {first['msg']}; make the tokenizer again") from None


def _read_net(kind: type[Net], name: str, arch: Architecture, path: Path, device: torch.device | str) -> Net:
    """An `Encoder` or a `Decoder` with every tensor of the file under its name, none missing, none left over."""
    with torch.device("meta"):
        net = kind(arch)
    wanted = {f"{name}.{key}": list(value.shape) for key, value in net.state_dict().items()}
    try:
        with safe_open(path / WEIGHTS, "pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys() if key.startswith(f"{name}.")}
            wrong = next((key for key in wanted | found if wanted.get(key) != found.get(key)), None)
            if wrong:
                raise TokenizerError(
                    f"'{path / WEIGHTS}': {wrong} wants {wanted.get(wrong, 'not to be there')}, found "
                    f"{found.get(wrong, 'nothing')}; {CARD} is of another tokenizer: make it again"
                )
            tensors = {key.removeprefix(f"{name}."): file.get_tensor(key).float().to(device) for key in wanted}
    except SafetensorError as err:
        raise TokenizerError(f"'{path / WEIGHTS}' is no safetensors file: {err}; make the tokenizer again") from None
    net.load_state_dict(tensors, assign=True)
    return net
