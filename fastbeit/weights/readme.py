"""The model card of an export, README.md: what the model is, how it was trained, on what, how well; how to load it."""

import json
from pathlib import Path
from typing import Any

from fastbeit import __version__
from fastbeit.train.checkpoint import ALIASES, load_state, resolve_checkpoint
from fastbeit.weights.models import ModelWeights
from fastbeit.weights.own import CARD, is_own

USE = {
    "timm": """import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
# or by name: timm.create_model("{architecture}", {arguments},
#     checkpoint_path="FOLDER/model.safetensors")""",
    "hf": """from transformers import BeitImageProcessor, {architecture}

model = {architecture}.from_pretrained("FOLDER").eval()
processor = BeitImageProcessor.from_pretrained("FOLDER")""",
    "unilm": """# for `--finetune` of the authors' programs; a pickle, as theirs are, with nothing but tensors in it
state = torch.load("FOLDER/model.pth", weights_only=True)["model"]""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
{outputs} = session.run(None, {{{inputs}}})""",
}
# what a log says of the machine and of the step, not of the model
OF_THE_MACHINE = ("step", "images_per_s", "data_wait", "skipped", "bad_", "agreement")
LIBRARIES = {"timm": "timm", "hf": "transformers", "unilm": "pytorch", "onnx": "onnx"}


def model_card(found: ModelWeights, to: str, path: Path, use: dict[str, str], left_out: list[str]) -> str:
    """
    Args:
        to: a key of `USE`.
        path: of the weights; a run's settings and log are read too.
        use: what goes into the lines of `USE`.
        left_out: tensors of ours that are not in the export.
    """
    state, lines = _run_of(path)
    config = state.get("config", {})
    head = "lm_head.weight" in found.tensors, "head.weight" in found.tensors
    task = "image-classification" if head[1] else "image-feature-extraction"
    front = ["---", f"library_name: {LIBRARIES[to]}", f"pipeline_tag: {task}", "tags:", "- beit", "- vision", "---"]
    parts = [
        "\n".join(front),
        "# BEiT, exported by fastbeit " + __version__,
        _shape(found),
        f"## Use\n\nWith FOLDER in place of this folder's path:\n\n```python\n{USE[to].format(**use)}\n```",
        _pixels(found),
        f"Left out: {', '.join(left_out)}." if left_out else "",
    ]
    if config:
        parts += [_recipe(config, state), _data(config, state), _tokenizer(config, state), _figures(lines)]
    parts.append(_origin(found))
    return "\n\n".join(part for part in parts if part) + "\n"


def _run_of(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """State of the checkpoint and lines of the log up to it; nothing for weights that are of no run."""
    folder = path if path.is_dir() or path.name in ALIASES else path.parent
    if not is_own(path) or (folder / CARD).is_file():
        return {}, []
    checkpoint = resolve_checkpoint(folder)
    state, log = load_state(checkpoint), checkpoint.parent.parent / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return state, [line for line in lines if line.get("step", 0) <= state["step"]]


def _shape(found: ModelWeights) -> str:
    model, tensors = found.model, found.tensors
    if "lm_head.weight" in tensors:
        what = f"pre-trained; predicts which of {len(tensors['lm_head.weight']):,} visual words a hidden patch is"
    elif "head.weight" in tensors:
        what = f"a classifier of {len(tensors['head.weight']):,} classes"
    else:
        what = "an encoder without a head"
    return _table(
        {
            "model": what,
            "width, blocks, heads, MLP": f"{model.width}, {model.depth}, {model.num_heads}, {model.mlp_width}",
            "images, patches": f"{_by(found.image_size)}, {_by(model.patch_size)} pixels",
            "relative positions": model.relative_position.replace("_", " "),
            "absolute positions": "yes" if model.absolute_position else "no",
            "LayerScale": "yes" if model.layer_scale else "no",
        }
    )


def _pixels(found: ModelWeights) -> str:
    if found.mean is None:
        return "Pixels: what they were normalised with is not known."
    return f"Pixels: RGB in [0, 1], less {list(found.mean)}, over {list(found.std or ())}."


def _recipe(config: dict[str, Any], state: dict[str, Any]) -> str:
    optim = config.get("optim", {})
    rows = {"step": state.get("step"), "seed": config.get("seed")}
    rows |= {key: config.get(key) for key in ("init", "objective", "mask", "predict") if key in config}
    for section in ("masking", "augment"):
        rows |= {f"{section}.{key}": value for key, value in config.get(section, {}).items()}
    rows |= {f"optim.{key}": value for key, value in optim.items()}
    rows |= {f"model.{key}": config["model"].get(key) for key in ("layer_scale", "drop_path")}
    return "## Recipe\n\nKeys are those of `fastbeit`.\n\n" + _table(rows)


def _data(config: dict[str, Any], state: dict[str, Any]) -> str:
    data = config.get("data", {})
    rows = {
        "index": f"{Path(data.get('index') or '-').name}, fingerprint {state.get('index', '-')}",
        "held-out index": Path(data.get("val_index") or "-").name,
    }
    keys = "crop_scale", "crop_ratio", "flip", "jitter", "jitter_on", "num_crops", "pipeline"
    return "## Data\n\n" + _table(rows | {f"data.{key}": data.get(key) for key in keys if key in data})


def _tokenizer(config: dict[str, Any], state: dict[str, Any]) -> str:
    if "tokenizer" not in config:
        return ""
    if not state.get("tokenizer"):
        return "## Tokenizer\n\nNone."
    path = config["tokenizer"].get("path")
    name = Path(path).name if path else "the one that comes with fastbeit"
    return f"## Tokenizer\n\n{name}, sha256 {state['tokenizer']}"


def _figures(lines: list[dict[str, Any]]) -> str:
    """The last of each kind of line."""
    last = {line.get("event", "training"): line for line in lines}
    rows = {}
    for event in ("training", *(key for key in last if key != "training")):
        for key, value in last.get(event, {}).items():
            if type(value) in (int, float) and not key.startswith(OF_THE_MACHINE):
                rows[f"{event}, step {last[event]['step']}: {key}"] = f"{value:.6g}"
    return "## Figures\n\nThe last lines of the run's log.\n\n" + _table(rows) if rows else ""


def _origin(found: ModelWeights) -> str:
    origin = found.origin
    text = f"## Origin\n\n{origin.dialect}: {origin.file}, sha256 {origin.sha256}."
    return "\n\n".join([text, *origin.notes])


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| what | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
