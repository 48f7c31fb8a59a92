"""Hugging Face's BEiT, in and out: names of files on the hub, which every version of transformers reads and writes, and
those that the modules of transformers 5 have in memory.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from fastbeit.config.sections import ModelConfig, Size
from fastbeit.model.vit import NORM_EPS
from fastbeit.weights.dialect import (
    HALF,
    KEY_BIAS,
    Channels,
    Dialect,
    Hints,
    Names,
    channels,
    pair,
    positive,
    reason_for,
    sorted_out,
    split,
)
from fastbeit.weights.pickles import Malformed, shown
from fastbeit.weights.source import Source

# beginnings of names: ours, on the hub, in memory; the encoder's stand after "beit." unless the encoder was saved alone
TOP = (
    ("cls_token", "embeddings.cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection.", "embeddings.patch_embeddings.projection."),
    ("rel_pos_bias.", "encoder.relative_position_bias.", "shared_position_bias."),
    ("fc_norm.", "pooler.layernorm.", "pooler.layernorm."),
)
HEADS = (
    ("norm.", "layernorm.", "layernorm."),
    ("lm_head.", "lm_head.", "lm_head."),
    ("head.", "classifier.", "classifier."),
)
BLOCKS = ("blocks.", "encoder.layer.", "layers.")
BLOCK = (
    ("attn.qkv.weight@q", "attention.attention.query.weight", "attention.q_proj.weight"),
    ("attn.qkv.weight@k", "attention.attention.key.weight", "attention.k_proj.weight"),
    ("attn.qkv.weight@v", "attention.attention.value.weight", "attention.v_proj.weight"),
    ("attn.q_bias", "attention.attention.query.bias", "attention.q_proj.bias"),
    ("attn.v_bias", "attention.attention.value.bias", "attention.v_proj.bias"),
    (
        "attn.relative_position_",
        "attention.attention.relative_position_bias.relative_position_",
        "relative_position_bias.relative_position_",
    ),
    ("attn.proj.", "attention.output.dense.", "attention.o_proj."),
    ("gamma_", "lambda_", "lambda_"),
    ("norm1.", "layernorm_before.", "layernorm_before."),
    ("norm2.", "layernorm_after.", "layernorm_after."),
    ("mlp.fc1.", "intermediate.dense.", "mlp.fc1."),
    ("mlp.fc2.", "output.dense.", "mlp.fc2."),
)
LEFT_OUT = {
    r".*relative_position_index$": "follows from the grid; it was compared",
    r".*attention\.(attention\.key|k_proj)\.bias$": KEY_BIAS,
    r"(decode_head|auxiliary_head|fpn\d?)\b": "a head for segmentation",
}
Layout = Literal["hub", "memory"]


def fits(names: Iterable[str]) -> bool:
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)


def translate(names: Iterable[str]) -> Names:
    return sorted_out(names, lambda name: reason_for(name, LEFT_OUT), to_ours)


def to_ours(name: str) -> str:
    """A name of either layout; an unknown one is given back as it is, with a mark that no name of ours has."""
    own = name.removeprefix("beit.")
    for column in (1, 2):
        if own.startswith(BLOCKS[column]):
            number, _, rest = own.removeprefix(BLOCKS[column]).partition(".")
            table, start, own_rest = BLOCK, f"blocks.{number}.", rest
        else:
            table, start, own_rest = (*TOP, *HEADS), "", own
        for row in table:
            if own_rest.startswith(row[column]):
                return start + row[0] + own_rest.removeprefix(row[column])
    return f"?{name}"


def to_theirs(name: str, layout: Layout = "hub", norm_in_encoder: bool = False) -> str:
    """
    Args:
        norm_in_encoder: where the last norm is: in the encoder, or beside the head (masked image modelling).
    """
    column = ("hub", "memory").index(layout) + 1
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        return f"beit.{BLOCKS[column]}{number}." + _replaced(rest, BLOCK, column)
    if any(name.startswith(row[0]) for row in TOP) or (name.startswith("norm.") and norm_in_encoder):
        return "beit." + _replaced(name, (*TOP, *HEADS), column)
    return _replaced(name, HEADS, column)


def _replaced(name: str, table: tuple[tuple[str, str, str], ...], column: int) -> str:
    row = next(row for row in table if name.startswith(row[0]))
    return row[column] + name.removeprefix(row[0])


def _in_a_message(name: str) -> str:
    if name.endswith("attn.qkv.weight"):
        return to_theirs(f"{name}@q").replace("query", "{query,key,value}")
    return to_theirs(name)


def _hints(source: Source) -> Hints:
    config, pixels = source.config, source.preprocessor
    kind, act = config.get("model_type", "beit"), config.get("hidden_act", "gelu")
    if kind != "beit" or act != "gelu":
        raise Malformed(f"has a config.json of model_type {shown(kind)} with {shown(act)}; BEiT with gelu is wanted")
    scale: Any = config.get("layer_scale_init_value")
    return Hints(
        num_heads=positive(config.get("num_attention_heads")),
        image_size=pair(config.get("image_size")),
        layer_scale=float(scale) if type(scale) in (int, float) and scale > 0 else None,
        mean=channels(pixels.get("image_mean")) or HALF,
        std=channels(pixels.get("image_std")) or HALF,
        classes=_classes(config.get("id2label")),
    )


def _classes(labels: Any) -> list[str] | None:
    """Names in the order of their numbers; None: there are none, or transformers has made them up."""
    if not isinstance(labels, dict):
        return None
    names = [name for i in range(len(labels)) if isinstance(name := labels.get(str(i)), str)]
    made_up = names == [f"LABEL_{i}" for i in range(len(names))]
    return None if made_up or len(names) < len(labels) else names


HUGGINGFACE = Dialect("huggingface", translate, _in_a_message, _hints)


def rename(tensors: dict[str, Tensor], layout: Layout = "hub") -> dict[str, Tensor]:
    """Our state dict, or gradients by its names, under theirs; what their models have no place for is left out.

    Indices follow from the grid. Of two norms, that after the mean pooling is the one that is used.
    """
    inside, pooled = "lm_head.weight" not in tensors, "fc_norm.weight" in tensors
    return {
        to_theirs(name, layout, inside): tensor
        for name, tensor in split(tensors).items()
        if not name.endswith("relative_position_index") and not (pooled and name.startswith("norm."))
    }


def write(
    tensors: dict[str, Tensor],
    model: ModelConfig,
    image_size: Size,
    mean: Channels,
    std: Channels,
    classes: list[str] | None,
    folder: Path,
) -> None:
    """`model.safetensors`, `config.json` and `preprocessor_config.json`, for `from_pretrained`.

    Args:
        classes: names of the head's rows, if they have some.

    Raises:
        Malformed: images or patches are not square; theirs must be (their tables of other grids are scrambled).
    """
    if image_size[0] != image_size[1] or model.patch_size[0] != model.patch_size[1]:
        raise Malformed(
            f"has images of {list(image_size)} and patches of {list(model.patch_size)} pixels; "
            "Hugging Face's BEiT takes square ones; export to timm, unilm or onnx"
        )
    renamed = {name: tensor.contiguous() for name, tensor in rename(tensors).items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = _config(tensors, model, image_size[0], classes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(image_size, mean, std), indent=2) + "\n")


def _config(
    tensors: dict[str, Tensor], model: ModelConfig, image_size: int, classes: list[str] | None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": "beit",
        "architectures": [architecture_of(tensors)],
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_width,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,  # theirs is 1e-12
        "image_size": image_size,
        "patch_size": model.patch_size[0],
        "use_mask_token": "mask_token" in tensors,
        "use_absolute_position_embeddings": model.absolute_position,
        "use_relative_position_bias": model.relative_position == "per_block",
        "use_shared_relative_position_bias": model.relative_position == "shared",
        "use_mean_pooling": "fc_norm.weight" in tensors or "lm_head.weight" in tensors,
        "layer_scale_init_value": model.layer_scale,
        "drop_path_rate": model.drop_path,
    }
    if "lm_head.weight" in tensors:
        config["vocab_size"] = len(tensors["lm_head.weight"])
    if "head.weight" in tensors:
        names = classes or [f"LABEL_{i}" for i in range(len(tensors["head.weight"]))]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def architecture_of(tensors: dict[str, Tensor]) -> str:
    if "lm_head.weight" in tensors:
        return "BeitForMaskedImageModeling"
    return "BeitForImageClassification" if "head.weight" in tensors else "BeitModel"


def _preprocessor(image_size: Size, mean: Channels, std: Channels) -> dict[str, Any]:
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": image_size[0], "width": image_size[1]},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
