"""The command `fastbeit`: one verb a job, no logic."""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastbeit import __version__
from fastbeit.config.arguments import one_config, parse
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure, explain_config, explain_fields, load_config, shipped_configs
from fastbeit.cores import num_cores
from fastbeit.errors import DONE, USAGE, RunError
from fastbeit.process import keep_outputs_harmless, leave

NUM_CROPS = 1280  # that a report measures a figure on

HELP = f"""fastbeit {__version__}: pre-train BEiT on unlabelled images

  fastbeit demo [--data DIR]                       photos to pictures of what was learnt, in minutes, on a CPU
  fastbeit index SOURCE -o images.idx              list the images of a folder, of shards, of tables
  fastbeit index check images.idx                  decode them all, list the bad ones
  fastbeit shard SOURCE -o shards/                 copy them into tar shards of small JPEGs, which load faster
  fastbeit tokenizer train --data images.idx -o DIR
                                                   train a dVAE of your own on them
  fastbeit tokenizer fetch -o DIR                  or take OpenAI's, of the paper: downloaded,
  fastbeit tokenizer import FILE [FILE] -o DIR     or from weights that you have; nothing in them is run
  fastbeit tokenize CONFIG data.num_crops=K        tokens of K crops an image ahead of time; pretrain data.tokens=tokens
  fastbeit data show CONFIG [-o sheet.png]         a picture of what training sees: crops, token views, masks
  fastbeit pretrain CONFIG [key=value ...]         pre-train; the same command again continues. CONFIG: a YAML file, or
                                                   beit_base_in1k, beit_large_in1k or demo
  fastbeit plan CONFIG --gpus N --gpu NAME         memory, hours, disk and cores that it will take, on any computer
  fastbeit report RUN                              pictures and the HTML page of a run
  fastbeit convert FILE -o DIR                     weights of others: the authors', timm's, Hugging Face's, DeiT's
  fastbeit export RUN --to timm|hf|unilm|onnx -o DIR
                                                   a run for the loaders of others, with a model card
  fastbeit doctor [CONFIG] [key=value ...]         what of this machine a run can use, and whether each kernel is right
  fastbeit doctor --tune [CONFIG] [key=value ...]  and what is fastest on its card, which runs then take

`fastbeit VERB --help` says more; `fastbeit --version` prints the version. On several GPUs:
  deepspeed --module fastbeit pretrain CONFIG [key=value ...]
  torchrun --nproc-per-node 8 -m fastbeit pretrain CONFIG [key=value ...]

Exit codes: 0 done, 2 usage or config, 65 too many bad images, 66 data missing, 73 and 74 cannot write, 75 stopped and
saved (run the same command again), 78 no usable checkpoint, 1 anything else."""


def run() -> NoReturn:
    """The command, as a process of its own."""
    keep_outputs_harmless()
    try:
        code = main()
    except SystemExit as end:  # of argparse
        code = end.code if isinstance(end.code, int) else DONE if end.code is None else 1
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    while args and args[0].startswith("--local_rank"):
        # the deepspeed launcher puts it before the verb; ranks are read from the environment
        args.pop(0)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return DONE if args else USAGE
    if args[0] == "--version":
        print(__version__)
        return DONE
    verb, *rest = args
    if verb not in VERBS:
        print(f"fastbeit: no verb '{verb}'{_meant(verb)} There are {', '.join(VERBS)}", file=sys.stderr)
        return USAGE
    try:
        return VERBS[verb](rest)
    except RunError as err:
        lines = str(err).splitlines()
        print("\n".join(f"fastbeit {verb}: {line}" for line in lines), file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print(f"fastbeit {verb}: interrupted", file=sys.stderr)
        return 130


def _meant(word: str) -> str:
    """The verbs nearest to a word, by the last part of their names."""
    ends = {name.split()[-1]: name for name in (*VERBS, *PARTS)}
    near = [ends[end] for end in difflib.get_close_matches(word, ends, n=2)]
    return f"; did you mean {' or '.join(near)}?" if near else "."


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _config(names: list[str], settings: list[str]) -> Config:
    return load_config(one_config(names, list(shipped_configs())), settings)


def _add_config(parser: argparse.ArgumentParser) -> None:
    """For the help alone: `parse` takes settings out before."""
    parser.add_argument("config", nargs="*", metavar="CONFIG [key=value ...]", help="as for `fastbeit pretrain`")


def _pretrain(args: list[str]) -> int:
    parser = argparse.ArgumentParser("fastbeit pretrain", add_help=False)
    _add_config(parser)
    parser.add_argument("-h", "--help", action="store_true")
    options, settings = parse(parser, args)
    if options.help:
        return explain_config(options.config, settings)
    config = _config(options.config, settings)

    from fastbeit.jobs.pretrain import pretrain

    return pretrain(config, command=["fastbeit", "pretrain", *args])


def _tokenize(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit tokenize",
        description="Tokens of data.num_crops crops of each image, those that `fastbeit pretrain` will draw with the "
        "same CONFIG and keys, for example data.num_crops=8; they go into data.tokens=DIR (tokens). The same command "
        "again continues. Runs under the launchers of several ranks too.",
    )
    _add_config(parser)
    parser.add_argument(
        "--info",
        type=_path,
        metavar="DIR",
        help="compare all tokens in DIR with their checksums (a training compares a sample), and say what they are",
    )
    options, settings = parse(parser, args)

    if options.info:
        from fastbeit.tokenizer.cache.info import describe
        from fastbeit.tokenizer.cache.reader import open_cache

        print(describe(open_cache(options.info)))
        return DONE
    config = _config(options.config, settings)

    from fastbeit.jobs.tokenize import tokenize

    return tokenize(config, command=["fastbeit", "tokenize", *args])


def _index(args: list[str]) -> int:
    if args[:1] == ["check"]:
        return _check_index(args[1:])
    parser = argparse.ArgumentParser(
        "fastbeit index",
        description="List the images of a source; files that cannot be used are listed with the reason. "
        "`fastbeit index check images.idx` decodes them all.",
    )
    parser.add_argument(
        "source",
        type=_path,
        nargs="+",
        metavar="SOURCE",
        help="folder of images, flat or with class folders, any depth; 'photos/*.jpg', in quotes; tar or zip, or a "
        "folder, a 'glob-*.tar' or a list 'x-{000..099}.tar' of them, in quotes; Parquet or a folder of `datasets`; "
        "text of a path a line, and after a TAB its class",
    )
    parser.add_argument("-o", "--output", type=_path, required=True, help="index file to write")
    parser.add_argument(
        "--hold-out",
        type=float,
        metavar="SHARE",
        help="write two: of images.idx, images.train.idx and images.val.idx with this share of the images of each "
        "class, for data.val_index; copies of an image go to one of them",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is held out (0)")
    options = parser.parse_args(args)
    if len(options.source) > 1:
        parser.error(f"one SOURCE is wanted, got {len(options.source)}; put a pattern of files in quotes")
    if options.hold_out is not None and not 0 < options.hold_out < 1:
        parser.error(f"--hold-out wants a share between 0 and 1, got {options.hold_out:g}")

    from fastbeit.data.index.scan import Division
    from fastbeit.jobs.index import index

    division = None if options.hold_out is None else Division(options.hold_out, options.seed)
    return index(options.source[0], options.output, division)


def _check_index(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit index check",
        description="Compare all of an index with its checksums, of which a training compares a sample, and decode all "
        "of its images; those that are bad, or are not those that were indexed, are listed.",
    )
    parser.add_argument("index", type=_path, help="made by `fastbeit index`")
    parser.add_argument("--workers", type=int, default=num_cores(), metavar="N", help="processes (a core each)")
    options = parser.parse_args(args)

    from fastbeit.jobs.check_index import check_index

    return check_index(options.index, max(1, options.workers))


def _shard(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit shard",
        description="Copy images into tar shards of small JPEGs, which load faster; the same command again continues. "
        "JPEGs that are small enough are copied as they are; bad images are left out and listed.",
    )
    parser.add_argument("source", type=_path, metavar="SOURCE", help="as for `fastbeit index`, or an index")
    parser.add_argument("-o", "--output", type=_path, required=True, help="directory to write")
    parser.add_argument(
        "--max-side",
        type=int,
        default=512,
        metavar="N",
        help="pixels that the shorter side of an image has at most; the longer one follows (512)",
    )
    parser.add_argument("--quality", type=int, default=90, choices=range(1, 101), metavar="Q", help="of JPEG (90)")
    parser.add_argument(
        "--levels",
        default="high_byte",
        metavar="LOW,HIGH",
        help="values of 16-bit images that become 0 and 255; image: the least and largest of each image (high_byte)",
    )
    parser.add_argument("--shard-mb", type=int, default=256, metavar="MB", help="size of a shard (256)")
    parser.add_argument("--workers", type=int, default=num_cores(), metavar="N", help="processes (a core each)")
    options = parser.parse_args(args)
    if min(options.max_side, options.shard_mb) < 1:
        parser.error("--max-side and --shard-mb want at least 1")

    from pydantic import ValidationError

    from fastbeit.jobs.shard import Settings, shard

    try:
        settings = Settings(
            source=str(options.source.absolute()),
            max_side=options.max_side,
            quality=options.quality,
            shard_mb=options.shard_mb,
            levels=options.levels.split(",") if "," in options.levels else options.levels,
        )
    except ValidationError as err:
        parser.error(f"--levels: {err.errors()[0]['msg']}")
    return shard(options.source, options.output, settings, max(1, options.workers), ["fastbeit", "shard", *args])


def _tokenizer(args: list[str]) -> int:
    actions = {"train": _train_tokenizer, "import": _import_tokenizer, "fetch": _fetch_tokenizer}
    parser = argparse.ArgumentParser("fastbeit tokenizer", description="Make what gives images their visual tokens.")
    parser.add_argument("action", choices=actions, help="train your own, import files of others, fetch OpenAI's")
    return actions[parser.parse_args(args[:1]).action](args)


def _import_tokenizer(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit tokenizer import",
        description="Make a tokenizer of weights that others released: OpenAI's encoder.pkl and decoder.pkl, "
        "mmpretrain's dalle_encoder.pth, FLAVA's or the BEiT authors' pytorch_model.bin, or a codebook in safetensors. "
        "Nothing that a file says is run, and weights that do not encode test pictures as a tokenizer are refused.",
    )
    parser.add_argument("files", nargs="+", type=_path, metavar="FILE", help="one, or encoder and decoder")
    parser.add_argument("-o", "--output", type=_path, required=True, help="directory to write")
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
    parser.add_argument("-o", "--output", type=_path, required=True, help="directory to write")
    options = parser.parse_args(args[1:])
    print(fetch_tokenizer(options.output, SOURCES[options.source]))
    return DONE


def _train_tokenizer(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit tokenizer train", description="Train a dVAE of your own; the same command again continues."
    )
    parser.add_argument("--data", type=_path, required=True, help="index of the images, made by `fastbeit index`")
    parser.add_argument("--val", type=_path, help="index of held-out images that the tokenizer is judged by")
    parser.add_argument("-o", "--output", type=_path, required=True, help="directory to write")
    parser.add_argument("--keys", action="store_true", help="list the settings that key=value takes")

    from fastbeit.config.tokenizer import TokenizerTrainConfig
    from fastbeit.jobs.train_tokenizer import train_tokenizer

    if "--keys" in args:
        return explain_fields("fastbeit tokenizer train", configure(TokenizerTrainConfig, []))
    options, settings = parse(parser, args[1:])
    config = configure(TokenizerTrainConfig, settings)
    return train_tokenizer(config, options.data, options.val, options.output, command=["fastbeit", "tokenizer", *args])


def _data(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit data",
        description="show: a contact sheet of what training sees, the first images of the run of this CONFIG, each "
        "with the box of its crop, both views and the mask.",
    )
    parser.add_argument("action", choices=["show"])
    _add_config(parser)
    parser.add_argument("-o", "--output", type=_path, default=Path("sheet.png"), help="PNG file to write (sheet.png)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="rows of the sheet (8)")
    options, settings = parse(parser, args)
    config = _config(options.config, settings)

    from fastbeit.jobs.show import show

    print(show(config, options.output, options.images))
    return DONE


def _plan(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit plan",
        description="What pre-training takes on GPUs that need not be there: memory, micro-batches, hours, disk and "
        "processor cores. Formulas and their assumptions: docs/planning.md.",
    )
    _add_config(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="in all")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="h100, for example; a wrong name lists them")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument("--images", type=int, default=1_281_167, metavar="N", help="of the data set (ImageNet-1k's)")
    parser.add_argument("--image-kb", type=float, default=110, metavar="KB", help="an image's file on average (110)")
    parser.add_argument("--json", type=_path, metavar="FILE", help="write the numbers there too")
    options, settings = parse(parser, args)
    config = _config(options.config, settings)

    from fastbeit.jobs.plan import Machine, plan

    machine = Machine(options.gpus, options.gpu, options.gpus_per_node, options.images, options.image_kb)
    print(plan(config, machine, options.json))
    return DONE


def _report(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit report", description="Measure and draw what a run learnt: PNG files and one HTML page."
    )
    parser.add_argument("run", type=_path, help="run directory")
    parser.add_argument("-o", "--output", type=_path, help="the page; RUN/report.html when not given")
    parser.add_argument(
        "--crops", type=int, default=NUM_CROPS, help="measured of held-out and of training images, each"
    )
    options = parser.parse_args(args)

    from fastbeit.jobs.report import report

    return report(options.run, options.output, max(1, options.crops))


def _convert(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit convert",
        description="Weights of any known kind, which is recognised, as safetensors under our names, with a card that "
        "says where each tensor came from. Known are fastbeit's; BEiT of its authors, timm and Hugging Face; ViT and "
        "DeiT by timm's names, DINO, MoCo v3, MAE. Nothing that a file says is run. More: docs/weights.md.",
    )
    parser.add_argument("file", type=_path, metavar="FILE", help="file, directory with one, run or checkpoint")
    parser.add_argument("-o", "--output", type=_path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--num-heads", type=int, metavar="N", help="where the file does not say; heads of 64 when not given"
    )
    options = parser.parse_args(args)

    from fastbeit.jobs.convert import convert

    print(convert(options.file, options.output, options.num_heads))
    return DONE


def _export(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit export",
        description="A run's newest checkpoint, or whatever `fastbeit convert` reads, for the loaders of others: "
        "timm and hf (safetensors, config, preprocessing), unilm (a pickle of weights, for its own programs), onnx "
        "(wants pip install 'fastbeit[export]'). With a model card, README.md.",
    )
    parser.add_argument(
        "run", type=_path, metavar="RUN", help="run directory, checkpoint, file or directory of weights"
    )
    parser.add_argument("--to", choices=("timm", "hf", "unilm", "onnx"), required=True, help="whose loader")
    parser.add_argument("-o", "--output", type=_path, required=True, metavar="DIR", help="directory to write")
    options = parser.parse_args(args)

    from fastbeit.jobs.export import export

    print(export(options.run, options.to, options.output))
    return DONE


def _demo(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit demo", description="Photos to pictures of what was learnt, in minutes, on a CPU."
    )
    parser.add_argument("--out", type=_path, default=Path("runs/demo"), help="directory; the same again continues")
    parser.add_argument("--data", type=_path, help="folder of photos of your own")
    parser.add_argument("--pretrain", action="store_true", help="before key=value: settings of pre-training")
    options, settings = parse(parser, args)

    from fastbeit.jobs.demo import run_demo

    return run_demo(options.out, options.data, settings, NUM_CROPS, ["fastbeit", "demo", *args])


def _doctor(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit doctor",
        description="Packages and cards: what a run of CONFIG can use here, what not, why, and how to get it. Each "
        "fused operator, by each of its implementations, is checked against float64 at the run's shapes; without a "
        "card, kernels are interpreted at small ones. Ends with 2 where something that CONFIG asks for by name does "
        "not run. With --tune it then times a block, forward and backward, by each attention that is right, and the "
        "loss by rows a chunk; a choice that is 3 % faster than the default is kept for runs of these shapes.",
    )
    parser.add_argument("config", nargs="*", metavar="CONFIG key=value", help="as for `fastbeit pretrain`; or BEiT-B")
    parser.add_argument("--json", type=_path, metavar="FILE", help="write the table there too")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="some minutes on a card; kept in $XDG_CACHE_HOME/fastbeit/tuned.json (~/.cache), by device, versions and "
        "shapes. On a CPU a try that decides nothing",
    )
    options, settings = parse(parser, args)
    config = _config(options.config, settings) if options.config else configure(Config, settings)

    from fastbeit.jobs.doctor import PAPERS_WORDS, doctor, num_outputs_of

    num_outputs = num_outputs_of(config) if options.config or settings else PAPERS_WORDS
    return doctor(config, num_outputs, options.json, options.tune)


PARTS = "index check", "data show", "tokenizer train", "tokenizer import", "tokenizer fetch"  # of verbs
VERBS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "index": _index,
    "shard": _shard,
    "tokenizer": _tokenizer,
    "tokenize": _tokenize,
    "data": _data,
    "pretrain": _pretrain,
    "plan": _plan,
    "report": _report,
    "convert": _convert,
    "export": _export,
    "doctor": _doctor,
}
