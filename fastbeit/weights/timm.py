"""timm's BEiT, in and out: the authors' names of a fine-tuned model, without indices.

Out: each block has its table (a shared one is copied, which changes nothing), there is no mask token and no head for
visual tokens, for timm has no model of them: a pre-trained model becomes an encoder that ends with its last norm.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastbeit.config.sections import ModelConfig, Size
from fastbeit.model.resize import share_out
from fastbeit.weights.dialect import HALF, Channels, Dialect, Hints
from fastbeit.weights.pickles import Malformed
from fastbeit.weights.source import Source
from fastbeit.weights.unilm import INDEX, translate
from fastbeit.weights.vit import timm_hints

FILE = "model.safetensors"
ABSENT = ("mask_token", "lm_head.")  # of their model
# those of their models that are of our shape: width, depth, heads, hidden width, patch and image sides
ARCHITECTURES = {
    (768, 12, 12, 3072, 16, 224): "beit_base_patch16_224",
    (768, 12, 12, 3072, 16, 384): "beit_base_patch16_384",
    (1024, 24, 16, 4096, 16, 224): "beit_large_patch16_224",
    (1024, 24, 16, 4096, 16, 384): "beit_large_patch16_384",
    (1024, 24, 16, 4096, 16, 512): "beit_large_patch16_512",
}
ANY = "beit_base_patch16_224"  # its arguments make a model of any other shape


def _hints(source: Source) -> Hints:
    found = timm_hints(source)
    return found._replace(mean=found.mean or HALF, std=found.std or HALF)


TIMM = Dialect("timm", translate, lambda name: name, _hints)


def rename(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our state dict under theirs; what their model has no place for is left out."""
    pooled = "fc_norm.weight" in tensors
    return {
        name: tensor
        for name, tensor in share_out(tensors, depth).items()
        if not name.startswith(ABSENT) and not name.endswith(INDEX) and not (pooled and name.startswith("norm."))
    }


def arguments(tensors: dict[str, Tensor], model: ModelConfig, image_size: Size) -> tuple[str, dict[str, Any]]:
    """Name and arguments for `timm.create_model`."""
    shape = (model.width, model.depth, model.num_heads, model.mlp_width, model.patch_size[0], image_size[0])
    args: dict[str, Any] = {
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "global_pool": "avg" if "fc_norm.weight" in tensors else "token",
    }
    if shape not in ARCHITECTURES:
        args |= {
            "img_size": image_size[0],
            "patch_size": model.patch_size[0],
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "mlp_ratio": model.mlp_width / model.width,
        }
    if shape not in ARCHITECTURES or model.relative_position == "none":
        args["use_rel_pos_bias"] = model.relative_position != "none"
    if model.absolute_position:
        args["use_abs_pos_emb"] = True
    if shape not in ARCHITECTURES or not model.layer_scale:
        args["init_values"] = model.layer_scale  # 0: none; None they would take for "not given"
    return ARCHITECTURES.get(shape, ANY), args


def write(
    tensors: dict[str, Tensor], model: ModelConfig, image_size: Size, mean: Channels, std: Channels, folder: Path
) -> None:
    """`model.safetensors` and `config.json`, for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Raises:
        Malformed: images or patches are not square; theirs need not be, but their loader takes tables for square ones.
    """
    if image_size[0] != image_size[1] or model.patch_size[0] != model.patch_size[1]:
        raise Malformed(
            f"has images of {list(image_size)} and patches of {list(model.patch_size)} pixels; "
            "timm's loader takes them for square ones; export to unilm or onnx"
        )
    if int(model.width * (model.mlp_width / model.width)) != model.mlp_width:
        raise Malformed(f"has an MLP of {model.mlp_width} for {model.width}, which is no ratio that timm can compute")
    renamed = {name: tensor.contiguous() for name, tensor in rename(tensors, model.depth).items()}
    save_file(renamed, folder / FILE, metadata={"format": "pt"})
    architecture, args = arguments(tensors, model, image_size)
    num_classes = args.pop("num_classes")
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": model.width,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, *image_size],
            "num_classes": num_classes,
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
