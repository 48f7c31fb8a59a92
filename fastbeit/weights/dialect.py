"""What a dialect is: someone's names for the tensors of a ViT, and what their files say beside them.

Our names are those of the authors' state dict. Where a dialect cuts a tensor in another way, its part has a mark: the
rows of `blocks.0.attn.qkv.weight` that make queries, keys and values are `blocks.0.attn.qkv.weight@q`, `@k` and `@v`;
`blocks.0.attn.qkv.bias` is q_bias, a bias of the keys and v_bias in one.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbeit.config.sections import Size
from fastbeit.weights.pickles import Malformed, shown
from fastbeit.weights.source import Source

Channels = tuple[float, float, float]
HALF: Channels = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KEY_BIAS = (
    "a bias of the keys is dropped: it adds the same number to all scores of a query, which the softmax cancels; the "
    "biases of queries and values are used"
)


class Hints(NamedTuple):
    """What shapes do not tell."""

    num_heads: int | None = None
    image_size: Size | None = None
    layer_scale: float | None = None
    mean: Channels | None = None  # of the channels of pixels in [0, 1] that the model was trained on
    std: Channels | None = None
    classes: list[str] | None = None  # names of the head's rows


class Names(NamedTuple):
    """Every name of a file, once: in `used` or in `left_out`."""

    used: dict[str, str]  # to ours
    left_out: dict[str, str]  # to the reason


def sorted_out(names: Iterable[str], reason: Callable[[str], str | None], ours: Callable[[str], str]) -> Names:
    """Each name to ours, or left out where there is a reason."""
    found = Names({}, {})
    for name in names:
        if why := reason(name):
            found.left_out[name] = why
        else:
            found.used[name] = ours(name)
    return found


class Dialect(NamedTuple):
    name: str
    translate: Callable[[Iterable[str]], Names]
    theirs: Callable[[str], str]  # for messages: what a tensor of ours is called in the file
    hints: Callable[[Source], Hints]


def under_prefix(names: Iterable[str], first: str, allowed: str, preferred: str = "") -> str:
    """What stands before the names of the model in this file.

    Args:
        first: a tensor that every such model has.
        allowed: pattern of prefixes that are known.
        preferred: part of the prefix that is taken where there are several.

    Raises:
        Malformed: it is another prefix, or there are several.
    """
    found = sorted(name.removesuffix(first) for name in names if name.endswith(first))
    chosen = [prefix for prefix in found if preferred and preferred in prefix] or found
    if len(chosen) != 1 or not re.fullmatch(allowed, chosen[0]):
        raise Malformed(f"has {first} under {', '.join(map(shown, found))}; one model under a known prefix is wanted")
    return chosen[0]


def reason_for(name: str, reasons: dict[str, str]) -> str | None:
    """Of patterns that begin a name, the reason of the first that fits."""
    return next((reason for pattern, reason in reasons.items() if re.match(pattern, name)), None)


def assembled(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors from marked ones and packed biases."""
    whole: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parts.items():
        base, _, mark = name.partition("@")
        if mark:
            thirds.setdefault(base, {})[mark] = tensor
        elif name.endswith("attn.qkv.bias"):
            if tensor.ndim != 1 or len(tensor) % 3:
                raise Malformed(f"has {shown(name)} {list(tensor.shape)}; q, k and v want a third of it each")
            base = name.removesuffix("qkv.bias")
            # the middle third is that of the keys: see KEY_BIAS
            whole[base + "q_bias"], _, whole[base + "v_bias"] = (third.clone() for third in tensor.chunk(3))
        else:
            whole[name] = tensor
    for base, third in thirds.items():
        if third.keys() == set("qkv") and len({part.shape for part in third.values()}) == 1:
            whole[base] = torch.cat([third[mark] for mark in "qkv"])
        elif third.keys() == set("qkv"):
            raise Malformed(f"has queries, keys and values of different shapes for {shown(base)}: no such model")
    return whole


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weight of queries, keys and values as three marked ones, for dialects that have them apart."""
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("attn.qkv.weight"):
            parts |= {f"{name}@{mark}": rows for mark, rows in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            parts[name] = tensor
    return parts


def pair(value: Any) -> Size | None:
    """Of another program's settings, a size in pixels or patches."""
    if type(value) is int and value > 0:
        return value, value
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    return None


def channels(value: Any) -> Channels | None:
    if isinstance(value, list) and len(value) == 3 and all(type(one) in (int, float) for one in value):
        return float(value[0]), float(value[1]), float(value[2])
    return None


def positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
