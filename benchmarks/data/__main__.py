"""Images a second a core: `python -m benchmarks.data [--only PART ...] [--photos DIR] [--rounds N] [--json FILE]`.

    photos    the pipelines and the official transform in turn, on photos of ImageNet's size: decoded alone, one view,
              two views; without jitter, with jitter of the whole image, with jitter of the crop
    large     the same of 2 to 4 megapixels, two views
    tar       two views, out of a tar
    shards    the photos of `large` as `fastbeit shard` writes them, two views
    host      the loader with decoding stubbed, in one process
    glue      what is neither decoding nor resizing nor jitter: order and boxes, masks, index and reading, batches
    fidelity  PSNR against the Pillow pipeline, and the share of tokens that stay the same

Each contestant has a process of its own, with one thread where its name says no other number. Rates are medians, of
images over CPU seconds; where there is a GPU, over seconds, since the CPU is not all that works there. `times` is of
the official transform as the authors have it, in the same rounds. It gives normalised floats and masks image by image;
ours give bytes, which the device normalises, and masks by batches. Memory is the process's peak, or what it and its
workers hold together after a turn. The photos are those of scikit-image, scikit-learn and sporco, as JPEGs.
"""

import argparse
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib.util import find_spec
from itertools import islice
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.card import cpu_name, environment
from benchmarks.data import official
from benchmarks.data.contestants import CONTESTANTS, Player, Task, Turn, masks_of, open_loader
from benchmarks.data.host import AIM_IMG_PER_S, host
from fastbeit.config.sections import DataConfig
from fastbeit.data.batch import Batch
from fastbeit.data.demo_photos import FOLDERS, HELD_OUT, TRAINING
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.plans import Plans
from fastbeit.data.reading import batch_of, read_step
from fastbeit.jobs.shard import Settings, shard
from fastbeit.tokenizer.disk import load_tokenizer

Row = dict[str, Any]
WIDTH, HEIGHT = 500, 375  # what most photos of ImageNet have, at some 110 KB
MOSAICS = (4, 3), (4, 4), (5, 4), (4, 5), (3, 4)  # photos across and down: 2.3 to 3.8 megapixels
QUALITY = 96  # as cameras and ImageNet have it; 90 makes files of half the size
PACKED = 256  # photos of a user's folder in the tar
AIM_CROP, AIM_FULL, AIM_GLUE, AIM_DB = 4.0, 1.5, 0.05, 38.0
VIEWS = {0: "decode", 1: "one view", 2: "two views"}
COMPARED_BATCH = 16
JITTERS = "off", "full_image", "crop"


def make_photos(folder: Path) -> None:
    """Parts of photos, not resampled, in `folder/photos`; mosaics of them in `folder/large`."""
    tiles = []
    for path in package_photos():
        with Image.open(path) as photo:
            right, bottom = photo.width - WIDTH, photo.height - HEIGHT
            if photo.mode == "RGB" and min(right, bottom) >= 0:
                tiles += [photo.crop((x, y, x + WIDTH, y + HEIGHT)) for x, y in ((0, 0), (right, bottom))]
    for name in ("photos", "large"):
        (folder / name).mkdir()
    for number, tile in enumerate(tiles):
        tile.save(folder / "photos" / f"{number:02}.jpg", quality=QUALITY)
    for number, (across, down) in enumerate(MOSAICS):
        mosaic = Image.new("RGB", (across * WIDTH, down * HEIGHT))
        for place in range(across * down):
            mosaic.paste(tiles[(7 * number + place) % len(tiles)], (place % across * WIDTH, place // across * HEIGHT))
        mosaic.save(folder / "large" / f"{number}.jpg", quality=QUALITY)


def package_photos() -> Iterator[Path]:
    for package, names in [*TRAINING.items(), *HELD_OUT.items()]:
        spec = find_spec(package)
        if not spec or not spec.origin:
            raise SystemExit(f"{package}, whose photos are used, is not installed; or take your own: --photos DIR")
        yield from (Path(spec.origin).parent / FOLDERS[package] / name for name in names)


def make_indexes(args: argparse.Namespace, folder: Path) -> Row:
    """`photos.idx` and, where the photos are not the user's, `large.idx`; a tar of the photos; says what they are."""
    if args.photos:
        build_index(args.photos, folder / "photos.idx")
    else:
        make_photos(folder)
        for name in ("photos", "large"):
            build_index(folder / name, folder / f"{name}.idx", progress=False)
    index = open_index(folder / "photos.idx")
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for i in range(min(PACKED, len(index))):
            tar.add(index.path(i), f"{i:04}{index.path(i).suffix}")
    return {
        path.stem: dict(
            images=len(of),
            mean_kb=float(of.sizes.mean()) / 1e3,
            mean_pixels=float((of.heights * 1.0 * of.widths).mean()),
        )
        for path in folder.glob("*.idx")
        if (of := open_index(path))
    }


def compete(args: argparse.Namespace, tasks: list[Task]) -> list[Row]:
    """A row a contestant and task, all in turn within each task."""
    rows: list[Row] = []
    with ExitStack() as stack:
        players = [stack.enter_context(closing(Player(who))) for who in args.who]
        for task in tasks:
            inside = [player for player in players if not player.absent and takes_part(player.who, task)]
            for player in inside:
                player.begin(task)
            turns = [{player.who: player.turn() for player in inside} for _ in range(args.rounds)]
            rows += [summary(task, player.who, turns) for player in inside]
        for row in rows:
            (player,) = (player for player in players if player.who == row["who"])
            row["peak_mib"] = max(row["peak_mib"], player.peak_mib())
        rows += [dict(who=player.who, note=player.absent) for player in players if player.absent]
    return [*rows, dict(who="ffcv", note=about_ffcv())]


def takes_part(who: str, task: Task) -> bool:
    if "threads" in who:
        return torch.cuda.is_available()
    return task.jitter == "crop" or "after crop" not in who


def summary(task: Task, who: str, turns: list[dict[str, Turn]]) -> Row:
    mine = [turn[who] for turn in turns]
    seconds = attrgetter("wall_s" if torch.cuda.is_available() else "cpu_s")
    return dict(
        who=who,
        work=VIEWS[task.views],
        jitter=task.jitter,
        img_per_s_core=median(turn.images / turn.cpu_s for turn in mine),
        slowest=min(turn.images / turn.cpu_s for turn in mine),
        fastest=max(turn.images / turn.cpu_s for turn in mine),
        img_per_s=median(turn.images / turn.wall_s for turn in mine),
        times=median(seconds(turn["official"]) / seconds(turn[who]) for turn in turns)
        if "official" in turns[0]
        else None,
        peak_mib=max(turn.memory_mib for turn in mine),
    )


def about_ffcv() -> str:
    try:
        import ffcv  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as err:
        return f"not installed: {err}"
    # its decoder draws a box of its own for each view
    return f"not measured: FFCV {ffcv.__version__} makes no two views of one box, and has no Lanczos"


def photos(args: argparse.Namespace, folder: Path) -> list[Row]:
    works = [(0, "off"), *((views, jitter) for views in (1, 2) for jitter in JITTERS)]
    return compete(args, [Task(folder / "photos.idx", True, args.batch, *work) for work in works])


def large(args: argparse.Namespace, folder: Path) -> list[Row]:
    if args.photos:
        return [dict(who="all", note="left out: --photos has its own sizes")]
    works = [(0, "off"), *((2, jitter) for jitter in JITTERS)]
    return compete(args, [Task(folder / "large.idx", True, max(2, args.batch // 8), *work) for work in works])


def tar(args: argparse.Namespace, folder: Path) -> list[Row]:
    build_index(folder / "photos.tar", folder / "tar.idx", progress=False)
    return compete(args, [Task(folder / "tar.idx", False, args.batch, 2, jitter) for jitter in JITTERS[1:]])


def shards(args: argparse.Namespace, folder: Path) -> list[Row]:
    if args.photos:
        return [dict(who="all", note="left out: make shards of your photos, and give them as --photos")]
    settings = Settings(source="large", max_side=512, quality=90, shard_mb=256)
    shard(folder / "large.idx", folder / "shards", settings, 1, ["fastbeit", "shard"])
    build_index(folder / "shards", folder / "shards.idx", progress=False)
    works = [(0, "off"), *((2, jitter) for jitter in JITTERS)]
    return compete(args, [Task(folder / "shards.idx", False, max(2, args.batch // 8), *work) for work in works])


def glue(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Microseconds an image of each piece, and their share of a loader that takes turns with them."""
    index, rows = open_index(folder / "photos.idx"), []
    for jitter_on in JITTERS[1:]:
        pieces = glue_pieces(Plans(DataConfig(tail="wrap"), index, args.batch, 0, 0, 1))
        with closing(open_loader(index, "torch", jitter_on, batch=args.batch)) as loader:
            pieces["loader"] = lambda _, loader=loader: next(loader)
            taken: dict[str, list[float]] = {who: [] for who in pieces}
            for step in range(args.rounds + 1):
                for who, piece in pieces.items():
                    start = time.process_time()
                    piece(step)
                    taken[who].append(1e6 * (time.process_time() - start) / args.batch)
        # the first round warms up
        us = {who: median(found[1:]) for who, found in taken.items()}
        whole = us.pop("loader") + us["masks"]
        us["glue, sum"] = sum(us.values())
        us["loader and masks"] = whole
        rows += [dict(who=who, jitter=jitter_on, us_per_image=t, share=t / whole) for who, t in us.items()]
    return rows


def glue_pieces(plans: Plans) -> dict[str, Callable[[int], object]]:
    """What is done to a batch beside decoding, resizing and jitter, each by the number of a step."""
    sides = plans.data.image_size, (official.TOKEN_SIZE, official.TOKEN_SIZE)
    views = [np.zeros((*side, 3), np.uint8) for side in sides]
    drawn = plans.draw(0)
    epoch, sample = torch.from_numpy(drawn.epoch), torch.from_numpy(drawn.sample)
    found = list(read_step(plans, drawn, lambda *of_image: None))

    def assemble(step: int) -> Batch:
        outputs = [np.empty((len(sample), *side, 3), np.uint8) for side in sides]
        for row in range(len(sample)):
            for output, view in zip(outputs, views, strict=True):
                output[row] = view
        images, token_images = map(torch.from_numpy, outputs)
        return batch_of(drawn, found, images, token_images)

    return {
        "order, boxes, flips, jitters": plans.draw,
        "masks": lambda step: masks_of(sample, epoch + step),
        "index and reading": lambda step: list(read_step(plans, drawn, lambda *of_image: None)),
        "batches": assemble,
    }


def fidelity(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Both views by torch and by DALI against those by Pillow, and their tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer("", device, torch.float32)
    rows = []
    for name in ("photos", "large"):
        for jitter in JITTERS if (folder / f"{name}.idx").exists() else ():
            wanted = some_batches(args, folder, name, jitter, "pillow")
            for pipeline in ("torch", "dali"):
                pairs = list(zip(some_batches(args, folder, name, jitter, pipeline), wanted, strict=True))
                tokens = [[tokenizer.encode(token_view(batch)) for batch in pair] for pair in pairs]
                rows.append(
                    dict(
                        who=f"{name}, {pipeline}",
                        jitter=jitter,
                        patch_view_db=mean_psnr([(one.images, two.images) for one, two in pairs]),
                        token_view_db=mean_psnr([(token_view(one), token_view(two)) for one, two in pairs]),
                        same_tokens=torch.cat([one == two for one, two in tokens]).double().mean().item(),
                        images=sum(len(one.sample) for one, _ in pairs),
                    )
                )
    return rows


def some_batches(args: argparse.Namespace, folder: Path, name: str, jitter: str, pipeline: str) -> list[Batch]:
    with closing(open_loader(open_index(folder / f"{name}.idx"), pipeline, jitter, batch=COMPARED_BATCH)) as loader:
        return list(islice(loader, -(-args.compared // COMPARED_BATCH)))


def token_view(batch: Batch) -> torch.Tensor:
    assert batch.token_images is not None
    return batch.token_images


def mean_psnr(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Decibels, mean over images [n, h, w, 3]; equal images count as 78 dB, an error of a 1000th of a level squared."""
    errors = torch.cat([(one.cpu().double() - two.double()).square().mean((1, 2, 3)) for one, two in pairs])
    return (10 * torch.log10(255**2 / errors.clamp_min(1e-3))).mean().item()


def aims(found: dict[str, list[Row]]) -> list[Row]:
    """What was wanted, and whether it was reached, of the parts that ran."""
    rows: list[Row] = []

    def judge(what: str, value: float, aim: float, reached: bool) -> None:
        rows.append(dict(who=what, value=value, aim=aim, reached=reached))

    for row in found.get("photos", []):
        if row["who"] == "ours, torch" and row["work"] == "two views" and row["jitter"] != "off" and row["times"]:
            aim = AIM_CROP if row["jitter"] == "crop" else AIM_FULL
            judge(f"times official, jitter {row['jitter']}, at least", row["times"], aim, row["times"] >= aim)
    for row in found.get("glue", []):
        if row["who"] == "glue, sum":
            judge(f"share of glue, jitter {row['jitter']}, under", row["share"], AIM_GLUE, row["share"] < AIM_GLUE)
    for row in found.get("host", []):
        # a worker hands over to a process that has others
        if row["who"] in ("torch", "dali") and "img_per_s" in row:
            rate = row["img_per_s"]
            judge(f"img/s of the host, {row['who']}, at least", rate, AIM_IMG_PER_S, rate >= AIM_IMG_PER_S)
    for row in found.get("fidelity", []):
        worst = min(row["patch_view_db"], row["token_view_db"])
        judge(f"dB, {row['who']}, jitter {row['jitter']}, at least", worst, AIM_DB, worst >= AIM_DB)
    return rows


def show(part: str, rows: list[Row]) -> None:
    rates = [row for row in rows if "img_per_s_core" in row]
    if rates:
        show_rates(part, rates)
    for row in rows:
        if "img_per_s_core" not in row:
            cells = (
                f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(f"{part:9} {row['who']:46}", "  ".join(list(cells)[1:]), flush=True)


def show_rates(part: str, rows: list[Row]) -> None:
    """A line a contestant, a column a task."""
    tasks = list(dict.fromkeys((row["work"], row["jitter"]) for row in rows))
    on_gpu = torch.cuda.is_available()
    print(f"{part:9} img/s{'' if on_gpu else ' a core'} (times of the official transform), MiB at the peak")
    for line in zip(*tasks, strict=True):
        print(" " * 37, *(f"{name:>14}" for name in line))
    for who in dict.fromkeys(row["who"] for row in rows):
        mine = {(row["work"], row["jitter"]): row for row in rows if row["who"] == who}
        cells = []
        for row in (mine.get(task) for task in tasks):
            rate = row and row["img_per_s" if on_gpu else "img_per_s_core"]
            times = f" ({row['times']:.2f})" if row and row["times"] else ""
            cells.append(f"{rate:,.0f}{times}" if rate else "")
        peak = max(row["peak_mib"] for row in mine.values())
        print(f"{part:9} {who:27}", *(f"{cell:>14}" for cell in cells), f"{peak:8,.0f} MiB", flush=True)


PARTS: dict[str, Callable[[argparse.Namespace, Path], list[Row]]] = {
    "photos": photos,
    "large": large,
    "tar": tar,
    "shards": shards,
    "host": host,
    "glue": glue,
    "fidelity": fidelity,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--who", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="WHO")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="photos of your own instead of the packages'")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, after one to warm up")
    parser.add_argument("--batch", type=int, help="images a turn (128; on CUDA 256); of large ones an eighth")
    parser.add_argument("--compared", type=int, default=96, help="images whose pixels and tokens are compared")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.parse_args()
    args.batch = args.batch or (256 if torch.cuda.is_available() else 128)
    torch.set_num_threads(1)
    # of the processes that are started
    os.environ["OMP_NUM_THREADS"] = "1"
    where = environment() | dict(cpu=cpu_name(), batch=args.batch, rounds=args.rounds)
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        where["sets"] = make_indexes(args, Path(folder))
        print(json.dumps(where), flush=True)
        for part in args.only:
            found[part] = PARTS[part](args, Path(folder))
            show(part, found[part])
    found["aims"] = aims(found)
    show("aims", found["aims"])
    if args.json:
        args.json.write_text(json.dumps(where | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
