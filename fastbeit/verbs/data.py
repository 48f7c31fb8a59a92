"""Verbs that make data: index, shard, tokenize, data show."""

import argparse
from pathlib import Path

from fastbeit.config.arguments import parse
from fastbeit.cores import num_cores
from fastbeit.errors import DONE
from fastbeit.verbs.arguments import add_config, path, read_config


def index_verb(args: list[str]) -> int:
    if args[:1] == ["check"]:
        return _check_index(args[1:])
    parser = argparse.ArgumentParser(
        "fastbeit index",
        description="List the images of a source; files that cannot be used are listed with the reason. "
        "`fastbeit index check images.idx` decodes them all.",
    )
    parser.add_argument(
        "source",
        type=path,
        nargs="+",
        metavar="SOURCE",
        help="folder of images, flat or with class folders, any depth; 'photos/*.jpg', in quotes; tar or zip, or a "
        "folder, a 'glob-*.tar' or a list 'x-{000..099}.tar' of them, in quotes; Parquet or a folder of `datasets`; "
        "text of a path a line, and after a TAB its class",
    )
    parser.add_argument("-o", "--output", type=path, required=True, help="index file to write")
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
    parser.add_argument(
        "index", type=path, help="made by `fastbeit index`; or what that takes, of which bad images are then printed"
    )
    parser.add_argument("--workers", type=int, default=num_cores(), metavar="N", help="processes (a core each)")
    options = parser.parse_args(args)

    from fastbeit.jobs.check_index import check_index

    return check_index(options.index, max(1, options.workers))


def shard_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit shard",
        description="Copy images into tar shards of small JPEGs, which load faster; the same command again continues. "
        "JPEGs that are small enough are copied as they are; bad images are left out and listed.",
    )
    parser.add_argument("source", type=path, metavar="SOURCE", help="as for `fastbeit index`, or an index")
    parser.add_argument("-o", "--output", type=path, required=True, help="directory to write")
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


def data_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit data",
        description="show: a contact sheet of what training sees, the first images of the run of this CONFIG, each "
        "with the box of its crop, both views and the mask.",
    )
    parser.add_argument("action", choices=["show"])
    add_config(parser)
    parser.add_argument("-o", "--output", type=path, default=Path("sheet.png"), help="PNG file to write (sheet.png)")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="rows of the sheet (8)")
    options, settings = parse(parser, args)
    config = read_config(options.config, settings)

    from fastbeit.jobs.show import show

    print(show(config, options.output, options.images))
    return DONE


def tokenize_verb(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "fastbeit tokenize",
        description="Tokens of data.num_crops crops of each image, those that `fastbeit pretrain` will draw with the "
        "same CONFIG and keys, for example data.num_crops=8; they go into data.tokens=DIR (tokens). The same command "
        "again continues. Runs under the launchers of several ranks too.",
    )
    add_config(parser)
    parser.add_argument(
        "--info",
        type=path,
        metavar="DIR",
        help="compare all tokens in DIR with their checksums (a training compares a sample), and say what they are",
    )
    options, settings = parse(parser, args)

    if options.info:
        from fastbeit.tokenizer.cache.info import describe
        from fastbeit.tokenizer.cache.reader import open_cache

        print(describe(open_cache(options.info)))
        return DONE
    config = read_config(options.config, settings)

    from fastbeit.jobs.tokenize import tokenize

    return tokenize(config, command=["fastbeit", "tokenize", *args])
