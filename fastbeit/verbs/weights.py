"""Verbs that take a model: convert, export, features, predict."""

import argparse
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
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes an image (5)")
    parser.add_argument("--json", type=path, metavar="FILE", help="write them there too")
    options = parser.parse_args(args)
    if options.top < 1:
        parser.error("--top wants at least 1")

    from fastbeit.jobs.predict import predict

    return predict(_model(options), options.source, options.top, options.json)


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


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _model(options: argparse.Namespace) -> Any:
    from fastbeit.evaluate.frozen import ModelSource

    mean, std = (values and tuple(values) for values in (options.mean, options.std))
    return ModelSource(options.model, mean, std, max(0, options.workers))
