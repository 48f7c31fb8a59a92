"""`fastbeit convert`: weights of any dialect, as a directory that every job of ours reads."""

from pathlib import Path

from fastbeit.weights.models import ModelWeights, read_model
from fastbeit.weights.own import WEIGHTS, refuse_full, save

SHOWN = 5  # reasons' examples


def convert(path: Path, out: Path, num_heads: int | None) -> str:
    """Write `path`'s weights to `out`; returns a report for the user. Errors as `read_model` and `own.save`."""
    refuse_full(out)
    found = read_model(path, num_heads)
    save(
        out,
        found.tensors,
        model=found.model,
        image_size=found.image_size,
        mean=found.mean,
        std=found.std,
        levels=found.levels,
        classes=found.classes,
        origin=found.origin,
    )
    return f"{describe(found)}\nwritten to {out / WEIGHTS}, every name in {out / 'model.json'}"


def describe(found: ModelWeights) -> str:
    """What was read, in a few lines."""
    model, origin = found.model, found.origin
    values = sum(tensor.numel() for name, tensor in found.tensors.items() if not name.endswith("_index"))
    under = f", under '{origin.wrapper}'" if origin.wrapper else ""
    heads = [name.removesuffix(".weight") for name in ("lm_head.weight", "head.weight") if name in found.tensors]
    bias = {"none": "no relative positions", "shared": "a shared bias table", "per_block": "a bias table a block"}
    lines = [
        f"{origin.dialect}: {origin.file}{under}, sha256 {origin.sha256}",
        f"width {model.width}, {model.depth} blocks, {model.num_heads} heads, MLP {model.mlp_width}, patches of "
        f"{model.patch_size[0]}x{model.patch_size[1]}, images of {found.image_size[0]}x{found.image_size[1]}, "
        f"{bias[model.relative_position]}{', absolute positions' * model.absolute_position}"
        f"{', LayerScale' * bool(model.layer_scale)}; heads: {', '.join(heads) or 'none'}; {values:,} values",
        f"{len(origin.used)} tensors used, {len(origin.left_out)} names left out",
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in origin.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        lines.append(f"  left out: {', '.join(names[:SHOWN])}{more}: {reason}")
    lines += [f"  note: {note}" for note in origin.notes]
    if found.mean is None:
        lines.append("  note: the file does not say what its images were normalised with; set data.mean and data.std")
    return "\n".join(lines)
