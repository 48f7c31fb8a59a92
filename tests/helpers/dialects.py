"""Small models of every dialect, with random weights: files as others write them."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.config.running import Kernels
from fastbeit.config.sections import ModelConfig
from fastbeit.model.beit import Beit
from fastbeit.train.checkpoint import save_checkpoint
from fastbeit.weights.onnx import Exported
from helpers.weights import randomise

WIDTH, DEPTH, HEADS, MLP, PATCH, SIDE, WORDS, CLASSES = 128, 2, 2, 96, 8, 32, 13, 7
CLASS_NAMES = [f"n{i:08}" for i in range(CLASSES)]
HALF = (0.5, 0.5, 0.5)
SMALL: dict[str, Any] = dict(width=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_width=MLP, patch_size=(PATCH, PATCH))
ABSOLUTE: dict[str, Any] = {"relative_position": "none", "absolute_position": True, "layer_scale": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_block": {"relative_position": "per_block"},
    "absolute": ABSOLUTE,
    "both": {"absolute_position": True},
}


def pretrained(seed: int = 0, side: int = SIDE, **fields: Any) -> Beit:
    torch.manual_seed(seed)
    model = Beit(
        ModelConfig(**SMALL | fields),
        image_size=(side, side),
        num_outputs=WORDS,
        mean=HALF,
        std=HALF,
        kernels=Kernels(),
    )
    randomise(model)
    return model


def finetuned(pooling: str = "mean", seed: int = 0, side: int = SIDE, **fields: Any) -> dict[str, Tensor]:
    """State dict of a classifier by the authors' names, which is also timm's but for the indices."""
    weights = pretrained(seed, side, **{"relative_position": "per_block"} | fields).state_dict()
    kept = {name: one for name, one in weights.items() if not name.startswith(("mask_token", "lm_head.", "norm."))}
    norm = "fc_norm" if pooling == "mean" else "norm"
    width = weights["cls_token"].shape[2]
    sizes = {f"{norm}.weight": [width], f"{norm}.bias": [width]}
    sizes |= {"head.weight": [CLASSES, width], "head.bias": [CLASSES]}
    return kept | {name: torch.randn(size) for name, size in sizes.items()}


def finetuned_run(
    folder: Path, weights: dict[str, Tensor], classes: Any = None, pooling: str = "mean", **data: Any
) -> Path:
    """A run of `fastbeit finetune`."""
    data = {"image_size": [SIDE, SIDE], "mean": HALF, "std": HALF, **data}
    model = {**SMALL, "relative_position": "per_block", "pooling": pooling}
    state = {"config": {"model": model, "data": data}, "classes": classes}
    save_checkpoint(folder / "checkpoints", 3, weights, {}, state)
    return folder


def pretrained_run(folder: Path, **fields: Any) -> Path:
    """A run of `fastbeit pretrain`."""
    state = {"config": {"model": SMALL | fields, "data": {"image_size": [SIDE, SIDE], "mean": HALF, "std": HALF}}}
    save_checkpoint(folder / "checkpoints", 3, pretrained(**fields).state_dict(), {}, state)
    return folder


def without_index(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one for name, one in weights.items() if not name.endswith("relative_position_index")}


def plain_vit(seed: int = 0, num_classes: int = CLASSES, **sizes: int) -> dict[str, Tensor]:
    """State dict of timm's ViT: queries, keys and values with one packed bias."""
    width, depth, mlp = sizes.get("width", WIDTH), sizes.get("depth", DEPTH), sizes.get("mlp", MLP)
    block = {
        "norm1.weight": [width], "norm1.bias": [width], "attn.qkv.weight": [3 * width, width],
        "attn.qkv.bias": [3 * width], "attn.proj.weight": [width, width], "attn.proj.bias": [width],
        "norm2.weight": [width], "norm2.bias": [width], "mlp.fc1.weight": [mlp, width], "mlp.fc1.bias": [mlp],
        "mlp.fc2.weight": [width, mlp], "mlp.fc2.bias": [width],
    }  # fmt: skip
    shapes = {
        "cls_token": [1, 1, width], "pos_embed": [1, (SIDE // PATCH) ** 2 + 1, width],
        "patch_embed.proj.weight": [width, 3, PATCH, PATCH], "patch_embed.proj.bias": [width],
        "norm.weight": [width], "norm.bias": [width],
    } | {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}  # fmt: skip
    if num_classes:
        shapes |= {"head.weight": [num_classes, width], "head.bias": [num_classes]}
    torch.manual_seed(seed)
    # weights that keep the variance; all else far from the zeros and ones that it starts with
    return {
        name: torch.randn(shape) * (0.5 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }


def vit_features(weights: dict[str, Tensor], pixels: Tensor, num_heads: int = HEADS) -> Tensor:
    """[B, S, D] after the last norm: the definition, with the bias of the keys."""
    width = weights["cls_token"].shape[2]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    proj = weights["patch_embed.proj.weight"]
    x = F.conv2d(pixels, proj, weights["patch_embed.proj.bias"], stride=proj.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat((weights["cls_token"].expand(len(x), -1, -1), x), dim=1) + weights["pos_embed"]
    for i in range(sum(name.endswith("norm1.weight") for name in weights)):
        block = f"blocks.{i}"
        heads = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(2, (3, num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = ((q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5).softmax(3) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    return norm(x, "norm")


def ours(found: Any) -> Exported:
    """The model of what `read_model` read, whatever its head; pixels are floats, channels first."""
    return Exported(found.tensors, found.model, found.image_size).eval().requires_grad_(False)


def images(batch: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def save(value: Any, path: Path, format: str = "zip") -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=format == "zip")
    return path


def trainers_file(weights: dict[str, Tensor], path: Path, wrapper: str = "model", **more: Any) -> Path:
    """As the authors' trainer writes it: settings, an optimizer with NumPy's numbers, a loss scale."""
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1e-3, 3)[1]
    content = {
        wrapper: weights,
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {"scale": 65536.0, "growth_tracker": 7},
        "args": Namespace(output_dir="out", device="cuda", betas=None, lr=np.float32(0.5), sizes=(14, 14), gpu=0),
    }
    return save(content | more, path)
