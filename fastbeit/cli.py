"""The command `fastbeit`: one verb a job, no logic."""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastbeit import __version__
from fastbeit.config.read import explain_config, explain_fields, overrides_of
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
  fastbeit pretrain CONFIG [key=value ...]         pre-train; the same command again continues
  fastbeit plan CONFIG --gpus N --gpu NAME         memory, hours, disk and cores that it will take, on any computer
  fastbeit report RUN                              pictures and the HTML page of a run
  fastbeit convert FILE -o DIR                     weights of others: the authors', timm's, Hugging Face's, DeiT's
  fastbeit export RUN --to timm|hf|unilm|onnx -o DIR
                                                   a run for the loaders of others, with a model card
  fastbeit doctor [CONFIG] [key=value ...]         what of this machine a run can use, and whether each kernel is right

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
        print(f"fastbeit: no verb '{verb}'; there are {', '.join(VERBS)}", file=sys.stderr)
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


def _pretrain(args: list[str]) -> int:
    from fastbeit.config.read import load_config

    if not args or {"-h", "--help"} & set(args):
        return explain_config([arg for arg in args if arg not in ("-h", "--help")])
    config = load_config(args[0], overrides_of(args[1:]))

    from fastbeit.jobs.pretrain import pretrain

    return pretrain(config, command=["fastbeit", "pretrain", *args])


def _tokenize(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit tokenize",
        description="Tokens of data.num_crops crops of each image, those that `fastbeit pretrain` will draw with the "
        "same CONFIG and keys; the same command again continues. Runs under the launchers of several ranks too.",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="as for `fastbeit pretrain`")
    parser.add_argument(
        "settings",
        nargs=argparse.REMAINDER,
        metavar="key=value",
        help="data.num_crops=K; data.tokens=DIR is where they go (tokens)",
    )
    parser.add_argument("--info", type=Path, metavar="DIR", help="check the tokens in DIR, and say what they are")
    options = parser.parse_args(args)

    if options.info:
        from fastbeit.tokenizer.cache.info import describe
        from fastbeit.tokenizer.cache.reader import open_cache

        print(describe(open_cache(options.info)))
        return DONE
    if not options.config:
        parser.error("CONFIG or --info DIR is wanted")

    from fastbeit.config.read import load_config
    from fastbeit.jobs.tokenize import tokenize

    config = load_config(options.config, overrides_of(options.settings))
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
        type=Path,
        nargs="+",
        metavar="SOURCE",
        help="folder of images, flat or with class folders, any depth; tar or zip, or a folder, a 'glob-*.tar' or a "
        "list 'x-{000..099}.tar' of them, in quotes; Parquet or a folder of `datasets`; text of a path a line, and "
        "after a TAB its class",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="index file to write")
    options = parser.parse_args(args)
    if len(options.source) > 1:
        parser.error(f"one SOURCE is wanted, got {len(options.source)}; put a pattern of files in quotes")

    from fastbeit.jobs.index import index

    return index(options.source[0], options.output)


def _check_index(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit index check", description="Decode all images of an index; those that are bad are listed."
    )
    parser.add_argument("index", type=Path, help="made by `fastbeit index`")
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
    parser.add_argument("source", type=Path, metavar="SOURCE", help="as for `fastbeit index`, or an index")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--max-side",
        type=int,
        default=512,
        metavar="N",
        help="pixels that the shorter side of an image has at most; the longer one follows (512)",
    )
    parser.add_argument("--quality", type=int, default=90, choices=range(1, 101), metavar="Q", help="of JPEG (90)")
    parser.add_argument("--shard-mb", type=int, default=256, metavar="MB", help="size of a shard (256)")
    parser.add_argument("--workers", type=int, default=num_cores(), metavar="N", help="processes (a core each)")
    options = parser.parse_args(args)
    if min(options.max_side, options.shard_mb) < 1:
        parser.error("--max-side and --shard-mb want at least 1")

    from fastbeit.jobs.shard import Settings, shard

    settings = Settings(
        source=str(options.source.absolute()),
        max_side=options.max_side,
        quality=options.quality,
        shard_mb=options.shard_mb,
    )
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
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="one, or encoder and decoder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
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
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    options = parser.parse_args(args[1:])
    print(fetch_tokenizer(options.output, SOURCES[options.source]))
    return DONE


def _train_tokenizer(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit tokenizer train", description="Train a dVAE of your own; the same command again continues."
    )
    parser.add_argument("--data", type=Path, required=True, help="index of the images, made by `fastbeit index`")
    parser.add_argument("--val", type=Path, help="index of held-out images that the tokenizer is judged by")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="`fastbeit tokenizer train --keys` lists them")

    from fastbeit.config.read import configure
    from fastbeit.config.tokenizer import TokenizerTrainConfig
    from fastbeit.jobs.train_tokenizer import train_tokenizer

    if "--keys" in args:
        return explain_fields("fastbeit tokenizer train", configure(TokenizerTrainConfig, []))
    options = parser.parse_intermixed_args(args[1:])
    config = configure(TokenizerTrainConfig, options.settings)
    return train_tokenizer(config, options.data, options.val, options.output, command=["fastbeit", "tokenizer", *args])


def _data(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit data",
        description="show: a contact sheet of what training sees, the first images of the run of this CONFIG, each "
        "with the box of its crop, both views and the mask.",
    )
    parser.add_argument("action", choices=["show"])
    parser.add_argument("config", metavar="CONFIG", help="as for `fastbeit pretrain`")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for `fastbeit pretrain`")
    parser.add_argument("-o", "--output", type=Path, default=Path("sheet.png"), help="PNG file to write (sheet.png)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="rows of the sheet (8)")
    options, more = parser.parse_known_intermixed_args(args)

    from fastbeit.config.read import load_config
    from fastbeit.jobs.show import show

    config = load_config(options.config, overrides_of([*options.settings, *more]))
    print(show(config, options.output, options.images))
    return DONE


def _plan(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit plan",
        description="What pre-training takes on GPUs that need not be there: memory, micro-batches, hours, disk and "
        "processor cores. Formulas and their assumptions: docs/planning.md.",
    )
    parser.add_argument("config", metavar="CONFIG", help="as for `fastbeit pretrain`")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for `fastbeit pretrain`")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="in all")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="h100, for example; a wrong name lists them")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument("--images", type=int, default=1_281_167, metavar="N", help="of the data set (ImageNet-1k's)")
    parser.add_argument("--image-kb", type=float, default=110, metavar="KB", help="an image's file on average (110)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options, more = parser.parse_known_intermixed_args(args)

    from fastbeit.config.read import load_config
    from fastbeit.jobs.plan import Machine, plan

    config = load_config(options.config, overrides_of([*options.settings, *more]))
    machine = Machine(options.gpus, options.gpu, options.gpus_per_node, options.images, options.image_kb)
    print(plan(config, machine, options.json))
    return DONE


def _report(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit report", description="Measure and draw what a run learnt: PNG files and one HTML page."
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("-o", "--output", type=Path, help="the page; RUN/report.html when not given")
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
    parser.add_argument("file", type=Path, metavar="FILE", help="file, directory with one, run or checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="directory to write")
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
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, checkpoint, file or directory of weights")
    parser.add_argument("--to", choices=("timm", "hf", "unilm", "onnx"), required=True, help="whose loader")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="directory to write")
    options = parser.parse_args(args)

    from fastbeit.jobs.export import export

    print(export(options.run, options.to, options.output))
    return DONE


def _demo(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit demo", description="Photos to pictures of what was learnt, in minutes, on a CPU."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory; the same again continues")
    parser.add_argument("--data", type=Path, help="folder of photos of your own")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="key=value", help="settings of pre-training")
    options = parser.parse_args(args)

    from fastbeit.jobs.demo import run_demo

    return run_demo(options.out, options.data, options.pretrain, NUM_CROPS, ["fastbeit", "demo", *args])


def _doctor(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit doctor",
        description="Packages and cards: what a run of CONFIG can use here, what not, why, and how to get it. Each "
        "fused operator, by each of its implementations, is checked against float64 at the run's shapes; without a "
        "card, kernels are interpreted at small ones. Ends with 2 where something that CONFIG asks for by name does "
        "not run.",
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG key=value", help="as for `fastbeit pretrain`; or BEiT-B")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    options, more = parser.parse_known_intermixed_args(args)

    from fastbeit.config.pretrain import Config
    from fastbeit.config.read import configure, load_config

    settings = [*options.settings, *more]
    if settings and "=" not in settings[0]:
        config = load_config(settings[0], overrides_of(settings[1:]))
    else:
        config = configure(Config, overrides_of(settings))

    from fastbeit.jobs.doctor import PAPERS_WORDS, doctor, num_outputs_of

    return doctor(config, num_outputs_of(config) if settings else PAPERS_WORDS, options.json)


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
