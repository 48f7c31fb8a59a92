"""`fastbeit tokenizer`: train, import, fetch."""

import argparse

from fastbeit.config.arguments import parse
from fastbeit.config.read import configure, explain_fields
from fastbeit.errors import DONE
from fastbeit.verbs.arguments import path


def tokenizer_verb(args: list[str]) -> int:
    actions = {"train": _train_tokenizer, "import": _import_tokenizer, "fetch": _fetch_tokenizer}
    parser = argparse.ArgumentParser("fastbeit tokenizer", description="Make what gives images their visual tokens.")
    parser.add_argument("action", choices=actions, help="train your own, import files of others, fetch OpenAI's")
    return actions[parser.parse_args(args[:1]).action](args)


def _train_tokenizer(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit tokenizer train", description="Train a dVAE of your own; the same command again continues."
    )
    parser.add_argument("--data", type=path, required=True, help="images: an index, or what `fastbeit index` takes")
    parser.add_argument("--val", type=path, help="likewise held-out ones that the tokenizer is judged by")
    parser.add_argument("-o", "--output", type=path, required=True, help="directory to write")
    parser.add_argument("--keys", action="store_true", help="list the settings that key=value takes")

    from fastbeit.config.tokenizer import TokenizerTrainConfig
    from fastbeit.jobs.train_tokenizer import train_tokenizer

    if "--keys" in args:
        return explain_fields("fastbeit tokenizer train", configure(TokenizerTrainConfig, []))
    options, settings = parse(parser, args[1:])
    config = configure(TokenizerTrainConfig, settings)
    return train_tokenizer(config, options.data, options.val, options.output, command=["fastbeit", "tokenizer", *args])


def _import_tokenizer(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit tokenizer import",
        description="Make a tokenizer of weights that others released: OpenAI's encoder.pkl and decoder.pkl, "
        "mmpretrain's dalle_encoder.pth, FLAVA's or the BEiT authors' pytorch_model.bin, or a codebook in safetensors. "
        "Nothing that a file says is run, and weights that do not encode test pictures as a tokenizer are refused.",
    )
    parser.add_argument("files", nargs="+", type=path, metavar="FILE", help="one, or encoder and decoder")
    parser.add_argument("-o", "--output", type=path, required=True, help="directory to write")
    options = parser.parse_args(args[1:])

    from fastbeit.weights.tokenizers import import_tokenizer

    print(import_tokenizer(options.files, options.output))
    return DONE


def _fetch_tokenizer(args: list[str]) -> int:
    from fastbeit.weights.download import SOURCES, fetch_tokenizer

    parser = argparse.ArgumentParser(
        "fastbeit tokenizer fetch",
        description="Download the dVAE that OpenAI released and import it; the same command again continues.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=SOURCES,
        default="openai",
        help="who keeps it: openai (400 MB), or the copies of flava and mmpretrain, which have no decoder (215 MB)",
    )
    parser.add_argument("-o", "--output", type=path, required=True, help="directory to write")
    options = parser.parse_args(args[1:])
    print(fetch_tokenizer(options.output, SOURCES[options.source]))
    return DONE
