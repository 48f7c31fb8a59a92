"""A tokenizer on disk: `dvae.safetensors` and its card `dvae.json`. Written atomically, read strictly, no pickle.

The card says of what kind the tokenizer is and how large; the tensors follow from that, by name and shape. A pair of
other names, `NAME.safetensors` and `NAME.json`, goes by the first of them: the bundled tokenizer is such a pair.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastbeit.config.explain import explain
from fastbeit.config.sections import Section
from fastbeit.config.tokenizer import Architecture
from fastbeit.errors import CANNOT_WRITE, CHECKPOINT_UNUSABLE, DATA_MISSING, USAGE, RunError, TokenizerError
from fastbeit.files import aside, put_in_place, sha256
from fastbeit.tokenizer.authors_vae import CustomizedArchitecture, CustomizedDecoder, CustomizedEncoder, CustomizedVAE
from fastbeit.tokenizer.codebook import CodebookArchitecture, CodebookDecoder, CodebookEncoder, CodebookTokenizer
from fastbeit.tokenizer.dvae import Decoder, Encoder
from fastbeit.tokenizer.fast import DiscreteVAE
from fastbeit.tokenizer.protocol import Tokenizer

# one pair of names for every kind: of what kind it is the card says, and no reader has to look for it
WEIGHTS, CARD = "dvae.safetensors", "dvae.json"
FORMAT = 1
BUNDLED = Path(__file__).parent.parent / "assets" / "dvae-small.safetensors"
BUNDLED_NOTE = (
    "the visual tokens are those of the small bundled tokenizer; results comparable with the paper want OpenAI's: "
    "`fastbeit tokenizer fetch -o dvae/`, then tokenizer.path=dvae/"
)
S = TypeVar("S", bound=Section)


class Kind(NamedTuple):
    """The classes of a kind of tokenizer; both nets are made from an architecture, and keep it as `arch`."""

    architecture: type[Section]
    encoder: type[nn.Module]
    decoder: type[nn.Module]
    tokenizer: Callable[..., Tokenizer]  # of encoder, read_decoder, fingerprint, dtype
    prefixes: tuple[str, str] = ("", "")  # of the tensors of encoder and decoder in the file


KINDS = {
    "dalle": Kind(Architecture, Encoder, Decoder, DiscreteVAE, ("encoder.", "decoder.")),
    "customized": Kind(CustomizedArchitecture, CustomizedEncoder, CustomizedDecoder, CustomizedVAE),
    "codebook": Kind(CodebookArchitecture, CodebookEncoder, CodebookDecoder, CodebookTokenizer),
}


class Card(Section):
    """What `dvae.json` holds."""

    format: int = Field(ge=FORMAT, le=FORMAT, description="version of this layout")
    kind: str = Field(default="dalle", description="a key of KINDS")
    architecture: dict[str, Any] = Field(description="fields of that kind's architecture")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the weights file")
    origin: dict[str, Any] = Field(default={}, description="where the weights come from, for the reader")


def save_tokenizer(
    path: Path, encoder: nn.Module, decoder: nn.Module | None = None, origin: dict[str, Any] | None = None
) -> None:
    """Write a tokenizer; a reader sees the old one, the new one, or an error, never a mixture.

    Args:
        path: a directory, made when it is not there, or NAME.safetensors.
        encoder: of a kind in `KINDS`; a tensor of half precision is written so, and read as float32.
        decoder: None: the tokenizer can encode, not decode.
        origin: facts for the reader of the card: command, data, licence.

    Raises:
        RunError: the files cannot be written (exit code 74).
    """
    name = {kind.encoder: name for name, kind in KINDS.items()}[type(encoder)]
    kind, arch = KINDS[name], encoder.arch
    assert isinstance(arch, Section)
    tensors = {
        prefix + key: value.detach().cpu().contiguous()
        for prefix, net in zip(kind.prefixes, (encoder, decoder), strict=True)
        for key, value in (net.state_dict() if net else {}).items()
    }
    weights, card_file = _files(path)
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside(weights))
        digest = sha256(aside(weights))
        card = Card(format=FORMAT, kind=name, architecture=arch.model_dump(), sha256=digest, origin=origin or {})
        aside(card_file).write_text(card.model_dump_json(indent=2) + "\n")
        put_in_place(weights)
        put_in_place(card_file)
    except (OSError, SafetensorError) as err:
        for left in (weights, card_file):
            with contextlib.suppress(OSError):
                aside(left).unlink(missing_ok=True)
        raise RunError(f"tokenizer cannot be written to '{path}': {err}", CANNOT_WRITE) from err


def load_tokenizer(
    path: Path | str = "", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tokenizer:
    """Read a tokenizer; of its decoder the names and shapes alone, until it is first used.

    Args:
        path: a directory with `dvae.safetensors` and `dvae.json`; NAME.safetensors, with NAME.json beside it; or an
            empty text, for the bundled tokenizer.
        dtype: in which the encoder computes.

    Raises:
        TokenizerError: a file is missing, damaged, or does not hold exactly the tensors of its architecture.
    """
    weights, card_file = _files(Path(path) if str(path) else bundled_path())
    card = _read_card(weights, card_file)
    kind = KINDS[card.kind]
    arch = _validated(kind.architecture, card.architecture, f"'{card_file}': architecture: ")
    found = sha256(weights)
    if found != card.sha256:
        raise TokenizerError(
            f"'{weights}' wants sha256 {card.sha256[:16]}..., as {card_file.name} says; found {found[:16]}...: the "
            "file was damaged or replaced; copy both files again, or make them again"
        )
    with torch.device("meta"):
        encoder, decoder = kind.encoder(arch), kind.decoder(arch)
    has_decoder = _check_tensors(weights, _shapes(encoder, kind.prefixes[0]), _shapes(decoder, kind.prefixes[1]))

    def read_decoder() -> nn.Module:
        if not has_decoder:
            raise TokenizerError(
                f"'{weights}' was imported or saved without a decoder: its words have no pictures; import the decoder "
                "too: `fastbeit tokenizer import encoder.pkl decoder.pkl -o DIR`"
            )
        return _read_into(decoder, weights, kind.prefixes[1], device)

    return kind.tokenizer(_read_into(encoder, weights, kind.prefixes[0], device), read_decoder, found, dtype)


def refuse_to_replace(out: Path, hashes: Sequence[str] = ()) -> None:
    """
    Args:
        hashes: SHA-256 of the files that a tokenizer is to be made of; what was made of some of them may be replaced.

    Raises:
        RunError: a tokenizer in `out`, or a training of one, would be lost (exit code 2).
    """
    weights, card_file = _files(out)
    if weights.exists() or card_file.exists():
        try:
            source = _read_card(weights, card_file).origin.get("source") or []
            old = {one["sha256"] for one in source}
        except (TokenizerError, TypeError, KeyError, AttributeError):
            old = set()
        if not old or not old <= set(hashes):
            raise RunError(
                f"'{out}' holds another tokenizer, which would be lost; choose another -o, or delete {weights.name} "
                f"and {card_file.name} there first",
                USAGE,
            )
    elif (out / "config.yaml").exists():
        raise RunError(f"'{out}' holds a run, which writes files there too; choose another -o", USAGE)


def vocab_size_of(path: Path | str = "") -> int:
    """How many visual words a tokenizer has, by its card alone; path and errors as in `load_tokenizer`."""
    weights, card_file = _files(Path(path) if str(path) else bundled_path())
    card = _read_card(weights, card_file)
    arch = _validated(KINDS[card.kind].architecture, card.architecture, f"'{card_file}': architecture: ")
    return arch.model_dump()["vocab_size"]


def in_memory(encoder: nn.Module, decoder: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Tokenizer:
    """The tokenizer that `save_tokenizer` would write and `load_tokenizer` read, without files or fingerprint."""
    kind = next(kind for kind in KINDS.values() if kind.encoder is type(encoder))

    def read_decoder() -> nn.Module:
        assert decoder is not None
        return deepcopy(decoder).float()

    return kind.tokenizer(deepcopy(encoder).float(), read_decoder, "", dtype)


def absolute(path: str) -> str:
    """Of a tokenizer's path, for a job that is started elsewhere; the bundled one has none."""
    return os.path.abspath(path) if path else ""


def bundled_path() -> Path:
    """The bundled tokenizer; its card says what it was trained on."""
    return BUNDLED


def is_bundled(fingerprint: str) -> bool:
    """Whether tokens are those of the bundled tokenizer, however it was named; then `BUNDLED_NOTE` is due."""
    return bundled_path().is_file() and sha256(bundled_path()) == fingerprint


def _files(path: Path) -> tuple[Path, Path]:
    """Weights and card."""
    if path.suffix == ".safetensors":
        return path, path.with_suffix(".json")
    return path / WEIGHTS, path / CARD


def _read_card(weights: Path, card_file: Path) -> Card:
    for file in (card_file, weights):
        if not file.is_file():
            raise TokenizerError(
                f"'{weights.parent}' wants {card_file.name} and {weights.name}; {file.name} is not there; make them "
                "with `fastbeit tokenizer fetch`, import or train",
                CHECKPOINT_UNUSABLE if weights.exists() or card_file.exists() else DATA_MISSING,
            )
    card = _validated(Card, card_file.read_bytes(), f"'{card_file}': ")
    if card.kind not in KINDS:
        raise TokenizerError(f"'{card_file}': kind wants one of {', '.join(KINDS)}; found '{card.kind}'")
    return card


def _validated(model: type[S], value: bytes | dict[str, Any], place: str) -> S:
    try:
        return model.model_validate_json(value) if isinstance(value, bytes) else model.model_validate(value)
    except ValidationError as err:
        raise TokenizerError(f"{place}{explain(err, model)[0]}; make the tokenizer again") from None


def _shapes(net: nn.Module, prefix: str) -> dict[str, list[int]]:
    return {prefix + key: list(value.shape) for key, value in net.state_dict().items()}


def _check_tensors(weights: Path, encoder: dict[str, list[int]], decoder: dict[str, list[int]]) -> bool:
    """Every tensor is there, by name and shape, and no other; of a decoder all or none. Is there one?"""
    try:
        with safe_open(weights, "pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except SafetensorError as err:
        raise TokenizerError(f"'{weights}' is no safetensors file: {err}; make the tokenizer again") from None
    has_decoder = not decoder or not decoder.keys().isdisjoint(found)
    wanted = encoder | decoder if has_decoder else encoder
    wrong = next((key for key in wanted | found if wanted.get(key) != found.get(key)), None)
    if wrong:
        raise TokenizerError(
            f"'{weights}': {wrong} wants {wanted.get(wrong, 'not to be there')}, found {found.get(wrong, 'nothing')}; "
            "its card is of another tokenizer: make it again"
        )
    return has_decoder


def _read_into(net: nn.Module, weights: Path, prefix: str, device: torch.device | str) -> nn.Module:
    with safe_open(weights, "pt") as file:
        tensors = {key: file.get_tensor(prefix + key).float().to(device) for key in net.state_dict()}
    net.load_state_dict(tensors, assign=True)
    return net
