"""Verbs that take a model: convert, export, features, predict, probe."""

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

from fastbeit.cores import num_cores
from fastbeit.errors import DONE
from fastbeit.verbs.arguments import path


def convert_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit convert",
        description="Weights of any known kind, which is recognised, as safetensors under our names, with a card that "
        "says where each tensor came from. Known are fastbeit's; BEiT of its authors, timm and Hugging Face; ViT and "
        "DeiT by timm's names, DINO, MoCo v3, MAE. Nothing that a file says is run. More: docs/weights.md.",
    )
    parser.add_argument("file", type=path, metavar="FILE", help="file, directory with one, run or checkpoint")
    parser.add_argument("-o", "--output", type=path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--num-heads", type=int, metavar="N", help="where the file does not say; heads of 64 when not given"
    )
    options = parser.parse_args(args)

    from fastbeit.jobs.convert import convert

    print(convert(options.file, options.output, options.num_heads))
    return DONE


def export_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit export",
        description="A run's newest checkpoint, or whatever `fastbeit convert` reads, for the loaders of others: "
        "timm and hf (safetensors, config, preprocessing), unilm (a pickle of weights, for its own programs), onnx "
        "(wants pip install 'fastbeit[export]'). With a model card, README.md.",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="run directory, checkpoint, file or directory of weights")
    parser.add_argument("--to", choices=("timm", "hf", "unilm", "onnx"), required=True, help="whose loader")
    parser.add_argument("-o", "--output", type=path, required=True, metavar="DIR", help="directory to write")
    options = parser.parse_args(args)

    from fastbeit.jobs.export import export

    print(export(options.run, options.to, options.output))
    return DONE


def features_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit features",
        description="What blocks of a model make of the middle of each image, with no norm applied, as safetensors: "
        "block_<i>, a row an image in the order of the index, and row and label. Beside it FILE.paths.json, the paths "
        "of the rows, and FILE.bad, the images that are bad and have no row. More: docs/using.md.",
    )
    _add_model(parser)
    parser.add_argument("source", type=path, metavar="SOURCE", help="an index, or as for `fastbeit index`")
    parser.add_argument("-o", "--output", type=path, required=True, metavar="FILE", help="features.safetensors, say")
    parser.add_argument(
        "--kind",
        choices=("cls", "mean", "concat", "patches"),
        default="cls",
        help="the cls token, the mean over the patches, both, or every patch in its place (cls)",
    )
    _add_blocks(parser, "the last")
    options = parser.parse_args(args)

    from fastbeit.jobs.features import features

    return features(_model(options), options.source, options.output, options.kind, options.blocks)


def predict_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit predict",
        description="The likeliest classes of each image by a fine-tuned model: a line an image, with TABs between "
        "columns. Where the images have labels of the model's classes, also how many are right. More: docs/using.md.",
    )
    _add_model(parser)
    parser.add_argument("source", type=path, metavar="SOURCE", help="an index, or as for `fastbeit index`")
    parser.add_argument("--top", type=_count, default=5, metavar="K", help="classes an image (5)")
    parser.add_argument("--json", type=path, metavar="FILE", help="write them there too")
    options = parser.parse_args(args)

    from fastbeit.jobs.predict import predict

    return predict(_model(options), options.source, options.top, options.json)


def probe_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit probe",
        description="How well classes are told by the frozen features of each block: by a linear classifier, as the "
        "authors train it, and by the 20 nearest neighbours, as DINO counts them. Features are computed once, of the "
        "middle of each image. A table, and the same as JSON. More: docs/using.md.",
    )
    _add_model(parser)
    source = "an index, or as for `fastbeit index`; with labels"
    parser.add_argument("--data", type=path, required=True, metavar="SOURCE", help=f"images to learn from: {source}")
    parser.add_argument("--val", type=path, required=True, metavar="SOURCE", help="images to classify: likewise")
    parser.add_argument(
        "--kind",
        choices=("concat", "cls", "mean"),
        default="concat",
        help="cls, mean over the patches, or both (concat)",
    )
    _add_blocks(parser, "all")
    parser.add_argument("--epochs", type=_count, default=100, metavar="N", help="of the linear classifier (100)")
    parser.add_argument("--lr", type=_rate, default=4e-3, help="its first learning rate (4e-3)")
    parser.add_argument("--batch-size", type=_count, default=1024, metavar="N", help="its images a step (1024)")
    parser.add_argument("--seeds", type=_count, default=1, metavar="N", help="times that it is trained (1)")
    parser.add_argument("-o", "--output", type=path, default=Path("probe.json"), metavar="FILE", help="(probe.json)")
    options = parser.parse_args(args)

    from fastbeit.evaluate.linear_probe import Recipe
    from fastbeit.jobs.probe import Settings, probe

    recipe = Recipe(epochs=options.epochs, lr=options.lr, batch_size=options.batch_size)
    settings = Settings(options.kind, options.blocks, recipe, options.seeds)
    return probe(_model(options), options.data, options.val, settings, options.output)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path, metavar="MODEL", help="run, checkpoint, file or directory of weights")
    for name, what in (("mean", "subtracted from pixels in [0, 1]"), ("std", "by which they are divided")):
        parser.add_argument(
            f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), help=f"{what}; when not given, as the file says"
        )
    parser.add_argument(
        "--workers", type=int, default=num_cores(), metavar="N", help="decoding processes (a core each)"
    )


def _add_blocks(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--blocks", type=_numbers, metavar="I,J,...", help=f"from 0 on ({default})")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 1 on; got '{text}'")
    return int(text)


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted numbers, such as 5,8,11; got '{text}'") from None


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"wanted a number above 0; got '{text}'")


def _model(options: argparse.Namespace) -> Any:
    from fastbeit.evaluate.frozen import ModelSource

    mean, std = (values and tuple(values) for values in (options.mean, options.std))
    return ModelSource(options.model, mean, std, max(0, options.workers))
