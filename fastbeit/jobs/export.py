"""`fastbeit export`: a run's weights for the loaders of others, with a model card."""

from pathlib import Path

from safetensors import SafetensorError

from fastbeit.errors import CANNOT_WRITE, RunError, WeightsError
from fastbeit.files import whole_folder
from fastbeit.weights import huggingface, onnx, timm, unilm
from fastbeit.weights.dialect import HALF
from fastbeit.weights.models import ModelWeights, read_model
from fastbeit.weights.own import refuse_full
from fastbeit.weights.pickles import Malformed
from fastbeit.weights.readme import model_card


def export(path: Path, to: str, out: Path) -> str:
    """Write `path`'s weights to `out`, whole or not at all; returns a report for the user.

    Args:
        path: whatever `read_model` reads.
        to: timm, hf, unilm or onnx.

    Raises:
        WeightsError: the model cannot be told in that dialect (exit code 78); and as `read_model`.
        RunError: `out` is there, or a package is missing (exit code 2), or `out` cannot be written (74).
    """
    refuse_full(out)
    if to == "onnx":
        onnx.check_installed()
    found = read_model(path)
    dropped = _left_out(found, to)
    try:
        with whole_folder(out) as folder:
            use = _write(found, to, folder)
            (folder / "README.md").write_text(model_card(found, to, path, use, dropped))
            written = ", ".join(sorted(file.name for file in folder.iterdir()))
    except Malformed as err:
        raise WeightsError(f"'{path}' {err}") from None
    except (OSError, SafetensorError) as err:
        raise RunError(f"'{out}' cannot be written: {err}", CANNOT_WRITE) from err
    note = f"\nleft out, for it has no place there: {', '.join(dropped)}" if dropped else ""
    return f"{out}: {written}; {out / 'README.md'} says how to load it{note}"


def _left_out(found: ModelWeights, to: str) -> list[str]:
    """What the others' models have no place for; of two norms, that after the mean pooling is the one that is used."""
    absent = timm.ABSENT if to == "timm" else ()
    if "fc_norm.weight" in found.tensors and to != "unilm":
        absent += ("norm.",)
    return [name for name in found.tensors if name.startswith(absent)]


def _write(found: ModelWeights, to: str, folder: Path) -> dict[str, str]:
    """The files; and what the model card's lines of code want to know."""
    tensors, model, size = found.tensors, found.model, found.image_size
    mean, std = found.mean or HALF, found.std or HALF
    if to == "timm":
        timm.write(tensors, model, size, mean, std, folder)
        name, args = timm.arguments(tensors, model, size)
        return {"architecture": name, "arguments": ", ".join(f"{key}={value!r}" for key, value in args.items())}
    if to == "hf":
        huggingface.write(tensors, model, size, mean, std, found.classes, folder)
        return {"architecture": huggingface.architecture_of(tensors)}
    if to == "unilm":
        unilm.write(tensors, folder)
        return {}
    exported = onnx.write(tensors, model, size, folder)
    return {"inputs": ", ".join(f'"{name}": ...' for name in exported.inputs), "outputs": exported.output}
