"""Weights that others released, as a tokenizer of ours: of what kind and how large they are follows from their shapes.

    OpenAI's whole modules, encoder.pkl and decoder.pkl     blocks.*, after any prefix
    mmpretrain's state dict, dalle_encoder.pth              blocks.*, alone or under `state_dict`
    FLAVA's of transformers, pytorch_model.bin              blocks.*, the same net by other names
    the BEiT authors' DiscreteVAE, pytorch_model.bin        encoder.*, decoder.*, codebook.weight, under `weights`
    a codebook, codebook.safetensors                        see codebook.py

`torchfile` reads all but the last without running anything that they say. Every tensor is wanted, by name and shape,
and no other; values keep their dtype.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from fastbeit.config.explain import explain
from fastbeit.config.sections import Section
from fastbeit.config.tokenizer import Architecture
from fastbeit.errors import DATA_MISSING, TokenizerError
from fastbeit.files import sha256
from fastbeit.tokenizer.authors_vae import CustomizedArchitecture, CustomizedDecoder, CustomizedEncoder
from fastbeit.tokenizer.codebook import import_codebook
from fastbeit.tokenizer.disk import load_tokenizer, refuse_to_replace, save_tokenizer
from fastbeit.tokenizer.dvae import Decoder, Encoder
from fastbeit.weights.pickles import Malformed, TensorSpec, shown
from fastbeit.weights.proof import prove
from fastbeit.weights.torchfile import named_tensors, open_torch

Shapes = dict[str, tuple[int, ...]]
FIRST, FLAVAS_FIRST = "blocks.input.w", "blocks.input.weight"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# no release comes near these; a hostile file does not get to say how large our nets are
LARGEST = {"group_count": 8, "n_blk_per_group": 16, "num_layers": 8} | dict.fromkeys(("n_hid", "hidden_dim"), 4096)


class Released(NamedTuple):
    """What a file holds."""

    path: Path
    nets: dict[str, nn.Module]  # `encoder`, `decoder` or both
    format: str

    def __str__(self) -> str:
        sizes = [
            f"{role} of {sum(p.numel() for p in net.parameters()):,} parameters" for role, net in self.nets.items()
        ]
        return f"{self.path}: {' and '.join(sizes)} ({self.format})"


def import_tokenizer(files: list[Path], out: Path, origin: dict[str, Any] | None = None) -> str:
    """Write the tokenizer that one file holds, or two together, in any order; returns a report for the user.

    Args:
        origin: more facts for the card.

    Raises:
        TokenizerError: a file is missing (exit code 66), damaged, holds no known tokenizer, or names what it may not,
            and nothing was run; or the two do not belong together; or the weights fail their `proof`. Nothing was
            written.
        RunError: `out` holds another tokenizer (2), or the tokenizer cannot be written (74).
    """
    for path in files:
        if not path.is_file():
            what = "is a directory; name the files of weights in it" if path.is_dir() else "does not exist"
            raise TokenizerError(f"'{path}' {what}", DATA_MISSING)
    hashes = [sha256(path) for path in files]
    refuse_to_replace(out, hashes)
    found = [read_released(path) for path in files]
    nets: dict[str, nn.Module] = {}
    for released in found:
        twice = nets.keys() & released.nets.keys()
        if twice:
            raise TokenizerError(f"'{released.path}' holds a second {min(twice)}; give one encoder and one decoder")
        nets |= released.nets
    encoder, decoder = nets.get("encoder"), nets.get("decoder")
    if encoder is None:
        raise TokenizerError(f"'{files[0]}' holds a decoder alone, which makes no tokens; give the encoder too")
    if isinstance(encoder, Encoder) and isinstance(decoder, Decoder):
        encoder.arch = _together(encoder.arch, decoder.arch)
    proof = prove(encoder, decoder)
    source = [
        {"file": one.path.name, "sha256": hashed, "format": one.format}
        for one, hashed in zip(found, hashes, strict=True)
    ]
    save_tokenizer(out, encoder, decoder, {"source": source, **(origin or {})})
    words = load_tokenizer(out).vocab_size
    use = "encodes and decodes" if decoder else "encodes; its words have no pictures, since there is no decoder"
    return "\n".join([*map(str, found), f"tokenizer: {out}: {words:,} words; {use}", proof])


def _together(encoder: Architecture, decoder: Architecture) -> Architecture:
    """The encoder's tensors leave n_init open, the decoder's nothing."""
    both = encoder.model_copy(update={"n_init": decoder.n_init})
    for (name, ours), (_, theirs) in zip(both, decoder, strict=True):
        if ours != theirs:
            raise TokenizerError(
                f"encoder and decoder are of two tokenizers: {name} is {ours} in the encoder, {theirs} in the decoder; "
                "import files of one release"
            )
    return both


def read_released(path: Path) -> Released:
    """The nets of a file of any known release; errors as `import_tokenizer`."""
    if path.suffix == ".safetensors":
        encoder, decoder = import_codebook(path)
        return Released(path, {"encoder": encoder, "decoder": decoder}, "codebook, safetensors")
    try:
        return _read(path)
    except Malformed as err:
        raise TokenizerError(f"'{path}' {err}") from None
    except OSError as err:
        raise TokenizerError(f"'{path}' cannot be read: {err.strerror or err}") from err


def _read(path: Path) -> Released:
    file = open_torch(path)
    specs = _without_prefix(_by_openais_names(named_tensors(file.value)))
    for key, spec in specs.items():
        if spec.storage.dtype not in DTYPES:
            raise Malformed(
                f"holds {shown(key)} of {spec.storage.dtype}; weights of a tokenizer are of "
                f"{', '.join(map(str, DTYPES))}: no such release"
            )
    kind, nets = recognise({key: spec.shape for key, spec in specs.items()})
    wanted = {key: tuple(value.shape) for net in nets.values() for key, value in net.state_dict().items()}
    for key in wanted | specs:
        found = specs[key].shape if key in specs else None
        if wanted.get(key) != found:
            raise Malformed(f"has {shown(key)} {_sizes(found)}, wants it {_sizes(wanted.get(key))}: no such release")
    tensors = file.tensors(specs)
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise Malformed(f"is damaged: {shown(key)} holds NaN or infinity; download it again")
    for net in nets.values():
        net.load_state_dict({key: tensors[key] for key in net.state_dict()}, assign=True)
    content = "state dict" if isinstance(file.value, dict) else "whole module"
    return Released(path, nets, f"{kind}, {content}, {file.format} format")


def _sizes(shape: tuple[int, ...] | None) -> str:
    return "nowhere" if shape is None else str(list(shape))


def _by_openais_names(specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """FLAVA's modules wrap groups and paths once more, and are PyTorch's own convolutions."""
    if not any(key.endswith(FLAVAS_FIRST) for key in specs):
        return specs
    renamed: dict[str, TensorSpec] = {}
    for key, spec in specs.items():
        name = re.sub(r"(group_\d+)\.group\.", r"\1.", key).replace(".res_path.path.", ".res_path.")
        name = re.sub(r"\.(w|b)(eight|ias)$", r".\1", name)
        if name in renamed:
            raise Malformed(f"has {shown(name)} twice, once as {shown(key)}: no such release")
        renamed[name] = spec
    return renamed


def _without_prefix(specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """mmpretrain's models put `target_generator.` before the names of this net, wrappers `module.`."""
    prefix = next((key.removesuffix(FIRST) for key in specs if key.endswith(FIRST)), "")
    for key in specs:
        if not key.startswith(prefix):
            raise Malformed(f"has {shown(key)} beside tensors of {shown(prefix)}*; give the tokenizer's alone")
    return {key.removeprefix(prefix): spec for key, spec in specs.items()}


def recognise(shapes: Shapes) -> tuple[str, dict[str, nn.Module]]:
    """Kind, and nets without values, of tensors with these shapes.

    Raises:
        Malformed: they are no weights of a known tokenizer.
    """
    if "codebook.weight" in shapes:
        arch = _customized(shapes)
        with torch.device("meta"):
            return "the BEiT authors' DiscreteVAE", {
                "encoder": CustomizedEncoder(arch),
                "decoder": CustomizedDecoder(arch),
            }
    if FIRST not in shapes:
        listed = ", ".join(map(shown, list(shapes)[:3])) or "no tensor at all"
        raise Malformed(f"wants {FIRST} (OpenAI's dVAE) or codebook.weight (the BEiT authors'), found {listed}")
    is_decoder = _size(shapes, FIRST, 2, 4) == 1  # its first kernel is 1 x 1, the encoder's 7 x 7
    arch = _dalle(shapes, is_decoder)
    with torch.device("meta"):
        return "OpenAI's dVAE", {"decoder": Decoder(arch)} if is_decoder else {"encoder": Encoder(arch)}


def _dalle(shapes: Shapes, is_decoder: bool) -> Architecture:
    last = "blocks.output.conv.w"
    counts = {
        "group_count": _count(shapes, r"blocks\.group_(\d+)\."),
        "n_blk_per_group": _count(shapes, r"blocks\.group_1\.block_(\d+)\."),
    }
    if is_decoder:
        sizes = {"n_hid": _size(shapes, last, 1, 4), "n_init": _size(shapes, FIRST, 0, 4)}
        return _architecture(Architecture, counts | sizes | {"vocab_size": _size(shapes, FIRST, 1, 4)})
    sizes = {"n_hid": _size(shapes, FIRST, 0, 4), "vocab_size": _size(shapes, last, 0, 4)}
    return _architecture(Architecture, counts | sizes)


def _customized(shapes: Shapes) -> CustomizedArchitecture:
    sizes = {
        "num_layers": _count(shapes, r"encoder\.(\d+)\.0\."),
        "hidden_dim": _size(shapes, "encoder.0.0.weight", 0, 4),
        "codebook_dim": _size(shapes, "codebook.weight", 1, 2),
        "vocab_size": _size(shapes, "codebook.weight", 0, 2),
    }
    return _architecture(CustomizedArchitecture, sizes)


S = TypeVar("S", bound=Section)


def _architecture(model: type[S], sizes: dict[str, int]) -> S:
    for name, size in sizes.items():
        if size > LARGEST.get(name, size):
            raise Malformed(f"wants {name} {size}; {LARGEST[name]} is the most that is read")
    try:
        return model(**sizes)
    except ValidationError as err:
        raise Malformed(f"is no known tokenizer: {explain(err, model)[0]}") from None


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _size(shapes: Shapes, key: str, dim: int, num_dims: int) -> int:
    shape = shapes.get(key, ())
    if len(shape) != num_dims:
        raise Malformed(f"wants {key} with {num_dims} dimensions, found {list(shape) or 'none'}")
    return shape[dim]
