"""Verbs that take a model: convert, export."""

import argparse

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
