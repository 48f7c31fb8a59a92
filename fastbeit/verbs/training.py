"""Verbs around a training: plan, doctor, pretrain, finetune, report, demo."""

import argparse
from pathlib import Path

from fastbeit.config.arguments import parse
from fastbeit.config.finetune import FinetuneConfig
from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure, explain_config
from fastbeit.errors import DONE
from fastbeit.verbs.arguments import add_config, path, read_config

NUM_CROPS = 1280  # that a report measures a figure on


def pretrain_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser("fastbeit pretrain", add_help=False)
    add_config(parser)
    parser.add_argument("-h", "--help", action="store_true")
    options, settings = parse(parser, args)
    if options.help:
        return explain_config("pretrain", options.config, settings)
    config = read_config(options.config, settings)

    from fastbeit.jobs.pretrain import pretrain

    return pretrain(config, command=["fastbeit", "pretrain", *args])


def finetune_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser("fastbeit finetune", add_help=False)
    add_config(parser)
    parser.add_argument("-h", "--help", action="store_true")
    options, settings = parse(parser, args)
    if options.help:
        return explain_config("finetune", options.config, settings, FinetuneConfig)
    config = read_config(options.config, settings, FinetuneConfig)

    from fastbeit.jobs.finetune import finetune

    return finetune(config, command=["fastbeit", "finetune", *args])


def plan_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit plan",
        description="What pre-training takes on GPUs that need not be there: memory, micro-batches, hours, disk and "
        "processor cores. Formulas and their assumptions: docs/planning.md.",
    )
    add_config(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="in all")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="h100, for example; a wrong name lists them")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument("--images", type=int, default=1_281_167, metavar="N", help="of the data set (ImageNet-1k's)")
    parser.add_argument("--image-kb", type=float, default=110, metavar="KB", help="an image's file on average (110)")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the numbers there too")
    options, settings = parse(parser, args)
    config = read_config(options.config, settings)

    from fastbeit.jobs.plan import Machine, plan

    machine = Machine(options.gpus, options.gpu, options.gpus_per_node, options.images, options.image_kb)
    print(plan(config, machine, options.json))
    return DONE


def doctor_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit doctor",
        description="Packages and cards: what a run of CONFIG can use here, what not, why, and how to get it. Each "
        "fused operator, by each of its implementations, is checked against float64 at the run's shapes; without a "
        "card, kernels are interpreted at small ones. Ends with 2 where something that CONFIG asks for by name does "
        "not run. With --tune it then times a block, forward and backward, by each attention that is right, and the "
        "loss by rows a chunk; a choice that is 3 % faster than the default is kept for runs of these shapes.",
    )
    parser.add_argument("config", nargs="*", metavar="CONFIG key=value", help="as for `fastbeit pretrain`; or BEiT-B")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the table there too")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="some minutes on a card; kept in $XDG_CACHE_HOME/fastbeit/tuned.json (~/.cache), by device, versions and "
        "shapes. On a CPU a try that decides nothing",
    )
    options, settings = parse(parser, args)
    config = read_config(options.config, settings) if options.config else configure(Config, settings)

    from fastbeit.jobs.doctor import PAPERS_WORDS, doctor, num_outputs_of

    num_outputs = num_outputs_of(config) if options.config or settings else PAPERS_WORDS
    return doctor(config, num_outputs, options.json, options.tune)


def report_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit report",
        description="Measure and draw what a pre-training or a fine-tuning learnt: PNG files and one HTML page.",
    )
    parser.add_argument("run", type=path, help="run directory")
    parser.add_argument("-o", "--output", type=path, help="the page; RUN/report.html when not given")
    parser.add_argument(
        "--crops",
        type=int,
        default=NUM_CROPS,
        help="of a pre-training: measured of held-out and of training images, each. A fine-tuning is measured on each "
        "held-out image once",
    )
    parser.add_argument(
        "--points",
        type=_point,
        nargs="+",
        metavar="ROW,COLUMN",
        help="patches whose attention maps are drawn, from 0,0; the centre and the thirds of the grid when not given",
    )
    parser.add_argument("--block", type=int, metavar="N", help="whose maps, from 0; the last when not given")
    parser.add_argument(
        "--tokenizer", type=path, metavar="DIR", help="where the run's tokenizer is now, if it was moved"
    )
    parser.add_argument("--data", type=path, metavar="SOURCE", help="likewise its images: an index, or a folder")
    parser.add_argument(
        "--val", type=path, metavar="SOURCE", help="likewise held-out images, those of the run or others"
    )
    options = parser.parse_args(args)

    from fastbeit.evaluate.attention import Reference
    from fastbeit.evaluate.finished_run import Moved
    from fastbeit.jobs.report import report

    reference = Reference(tuple(options.points) if options.points else None, options.block)
    moved = Moved(options.tokenizer, options.data, options.val)
    return report(options.run, options.output, max(1, options.crops), reference, moved)


def _point(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted row and column of a patch, such as 7,3; got '{text}'") from None
    return row, column


def demo_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit demo", description="Photos to pictures of what was learnt, in minutes, on a CPU."
    )
    parser.add_argument("--out", type=path, default=Path("runs/demo"), help="directory; the same again continues")
    parser.add_argument("--data", type=path, help="folder of photos of your own")
    parser.add_argument("--pretrain", action="store_true", help="before key=value: settings of pre-training")
    options, settings = parse(parser, args)

    from fastbeit.jobs.demo import run_demo

    return run_demo(options.out, options.data, settings, NUM_CROPS, ["fastbeit", "demo", *args])
