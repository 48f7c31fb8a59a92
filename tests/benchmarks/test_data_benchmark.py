import argparse
import json
import multiprocessing
import random
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import __main__ as benchmark
from benchmarks.data import host, official
from benchmarks.data.contestants import CONTESTANTS, Player, Task, held_mib, open_loader
from fastbeit.config.sections import DataConfig
from fastbeit.data import loader
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.plans import Plans
from fastbeit.data.sampling import draw_crops
from helpers import photos, tiny
from helpers.waiting import PATIENCE_S


def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)


def photo():
    return Image.open(photos.CHINA).convert("RGB")


# ---- the official transform, restated


def enhanced(pixels, op, factor):
    """What torchvision's `adjust_brightness`, `adjust_contrast` and `adjust_saturation` say, in NumPy."""
    red, green, blue = pixels.astype(int).transpose(2, 0, 1)
    grey = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    others = 0, int(grey.mean() + 0.5), grey[..., None]
    blended = np.float32(others[op]) + np.float32(factor) * (pixels.astype(np.float32) - np.float32(others[op]))
    return np.clip(blended, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("jitter_crop", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_transform_is_the_authors(seed, jitter_crop):
    seeded(seed)
    views = official.Transform(jitter_crop=jitter_crop)(photo())
    # by hand, in the authors' order: jitter of the whole image, flip, box, two resizes, mask
    seeded(seed)
    flipped = jitter_crop and torch.rand(1).item() < 0.5
    order = [op for op in torch.randperm(4).tolist() if op < 3]
    factors = [torch.empty(1).uniform_(0.6, 1.4).item() for _ in range(3)]
    flipped = flipped if jitter_crop else torch.rand(1).item() < 0.5
    pixels = np.asarray(photo())
    height, width = pixels.shape[:2]
    while True:
        area = random.uniform(0.08, 1) * height * width
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        across, down = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if across <= width and down <= height:
            top, left = random.randint(0, height - down), random.randint(0, width - across)
            break

    def jittered(pixels):
        for op in order:
            pixels = enhanced(pixels, op, factors[op])
        return pixels

    pixels = pixels if jitter_crop else jittered(pixels)
    pixels = (pixels[:, ::-1] if flipped else pixels)[top : top + down, left : left + across]
    crop = Image.fromarray(np.ascontiguousarray(jittered(pixels) if jitter_crop else pixels))
    patches = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC)) / 255
    tokens = np.asarray(crop.resize((112, 112), Image.Resampling.LANCZOS)) / 255
    # float32 against float64
    assert np.abs(views[0].permute(1, 2, 0).numpy() - (patches - 0.5) / 0.5).max() < 1e-6
    assert np.abs(views[1].permute(1, 2, 0).numpy() - (0.8 * tokens + 0.1)).max() < 1e-6
    assert views[2].shape == (14, 14) and views[2].dtype == torch.int64


def test_without_jitter_and_token_view_nothing_else_changes():
    for seed in range(3):
        seeded(seed)
        patches, mask = official.Transform(jitter=False, two_views=False)(photo())
        seeded(seed)
        image = official.flip(photo())
        box = official.draw_box(*image.size)
        crop = official.resized_crop(image, box, 224, Image.Resampling.BICUBIC)
        assert torch.equal(patches, official.normalize(official.to_tensor(crop)))
        assert torch.equal(mask, official.draw_mask())


def test_the_mask_is_the_first_of_the_authors_generator():
    random.seed(0)
    mask = official.draw_mask().flatten()
    # of microsoft/unilm's generator with the same seed
    assert (mask.sum(), mask.nonzero().sum()) == (75, 8499)


def test_jitter_has_torchvisions_statistics():
    torch.manual_seed(0)
    drawn = [official.ColorJitter().draw() for _ in range(3000)]
    orders, factors = (np.array(part) for part in zip(*drawn, strict=True))
    # a sixth each, +- 4 standard errors
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6 and np.abs(counts - 500).max() < 4 * (3000 / 6 * 5 / 6) ** 0.5
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    assert np.abs(factors.mean(axis=0) - 1).max() < 4 * 0.8 / 12**0.5 / 3000**0.5


@pytest.mark.parametrize("width, height", [(500, 375), (300, 500)])
def test_boxes_are_distributed_as_ours(width, height):
    random.seed(0)
    found = [official.draw_box(width, height) for _ in range(4000)]
    theirs = np.array([(box.top, box.left, box.height, box.width) for box in found])
    heights, widths = np.full((2, 4000), [[height], [width]])
    mine = draw_crops(0, np.zeros(4000, int), np.arange(4000), heights, widths, (0.08, 1), (3 / 4, 4 / 3))
    for boxes in (theirs, mine):
        assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()
    for of_box in (lambda box: box[:, 2] * box[:, 3], lambda box: np.log(box[:, 3] / box[:, 2]), lambda box: box[:, 0]):
        one, two = of_box(theirs), of_box(mine)
        # means apart by at most 4 standard errors
        assert abs(one.mean() - two.mean()) < 4 * ((one.var() + two.var()) / 4000) ** 0.5


@pytest.mark.parametrize(
    "size, box", [((1000, 10), (0, 493, 10, 13)), ((10, 1000), (493, 0, 13, 10))], ids=["wide", "tall"]
)
def test_where_no_box_fits_the_middle_is_taken(size, box):
    random.seed(0)
    assert official.draw_box(*size) == official.Box(*box)


# ---- the benchmark


FEW = "--rounds", "1", "--batch", "2", "--compared", "2"


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    build_index(tiny.make_photos(folder / "made", 6), folder / "photos.idx", progress=False)
    return folder


def run(folder, *args, **options):
    done = tiny.run(*args, "--json", str(folder / "found.json"), module="benchmarks.data", **options)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text()), done.stdout


@pytest.mark.parametrize("who", [who for who in CONTESTANTS if "torchvision" not in who])
def test_each_contestant_makes_each_thing(indexes, who):
    for views, jitter in ((0, "off"), (1, "off"), (2, "full_image"), (2, "crop")):
        batches = CONTESTANTS[who](Task(indexes / "photos.idx", True, 4, views, jitter))
        made = 0
        while made < 8:
            made += next(batches)
        batches.close()
        assert made == 8


def test_a_process_answers_for_its_workers_too(indexes):
    player = Player("official, DataLoader of 2")
    try:
        assert player.absent is None
        player.begin(Task(indexes / "photos.idx", True, 64, 2, "full_image"))
        turn = player.turn()
        assert turn.images == 64 and turn.wall_s > 0
        # alone the process collates, a tenth of the work; Pillow takes 64 small photos longer than this
        assert turn.cpu_s > 64 * 1e-3
        assert turn.memory_mib > 0 and player.peak_mib() > 0
    finally:
        player.close()


def test_memory_of_workers_counts():
    before = held_mib()
    hold = "import time; held = bytes(range(256)) * 2**18; time.sleep(60)"  # 64 MiB
    worker = multiprocessing.get_context("spawn").Process(target=exec, args=(hold,))
    worker.start()
    try:
        for _ in range(300):
            if held_mib() - before > 60:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{before:.0f} MiB grew to {held_mib():.0f}, not by 64")
    finally:
        worker.kill()
        worker.join()


def test_a_contestant_that_fails_ends_the_benchmark(indexes, capfd):
    player = Player("official")
    try:
        assert player.absent is None
        with pytest.raises(RuntimeError, match="'official' failed; its traceback stands above"):
            player.begin(Task(indexes / "nowhere.idx", True, 1, 0, "off"))
    finally:
        player.close()
    assert "nowhere.idx" in capfd.readouterr().err


def test_a_short_run_has_every_row(tmp_path):
    made = tiny.make_photos(tmp_path / "made", 4)
    who = ["official", "official, torchvision", "ours, torch"]
    parts = "photos", "glue", "fidelity"
    found, said = run(tmp_path, "--photos", str(made), *FEW, "--who", *who, "--only", *parts)
    assert list(found)[-4:] == [*parts, "aims"]
    works = [
        ("decode", "off"),
        *((f"{n} view" + "s" * (n == "two"), j) for n in ("one", "two") for j in benchmark.JITTERS),
    ]
    rates = {(row["who"], row["work"], row["jitter"]): row for row in found["photos"] if "work" in row}
    there = [name for name in who if any(name == row["who"] and "work" in row for row in found["photos"])]
    assert list(rates) == [(name, *work) for work in works for name in there]
    for row in rates.values():
        assert row["slowest"] <= row["img_per_s_core"] <= row["fastest"] and row["peak_mib"] > 50
        assert (row["times"] == 1) == (row["who"] == "official")
    # torchvision and FFCV take part or say why not, and no row is made up
    notes = {row["who"]: row["note"] for row in found["photos"] if "note" in row}
    assert set(who) - set(there) | {"ffcv"} == set(notes)
    assert all(note.startswith("not ") for note in notes.values())
    assert {row["who"] for row in found["glue"]} == {
        "order, boxes, flips, jitters", "masks", "index and reading", "batches", "glue, sum", "loader and masks",
    }  # fmt: skip
    compared = [(row["who"], row["jitter"]) for row in found["fidelity"]]
    assert compared == [(f"photos, {name}", jitter) for jitter in benchmark.JITTERS for name in ("torch", "dali")]
    assert len(found["aims"]) == 2 + 2 + 6
    for row in found["aims"]:
        assert row["reached"] in (True, False) and row["who"] in said
    for part in found:
        assert part in said


@pytest.mark.long
def test_a_whole_run_has_every_contestant(tmp_path):
    # minutes of work, alone
    found, _ = run(tmp_path, *FEW, patience_s=6 * PATIENCE_S)
    assert list(found)[-len(benchmark.PARTS) - 1 :] == [*benchmark.PARTS, "aims"]
    works = {
        "photos": {("decode", "off"), *((work, j) for work in ("one view", "two views") for j in benchmark.JITTERS)},
        "large": {("decode", "off"), *(("two views", jitter) for jitter in benchmark.JITTERS)},
        "tar": {("two views", "full_image"), ("two views", "crop")},
    }
    works["shards"] = works["large"]
    for part, wanted in works.items():
        for who in CONTESTANTS:
            rows = [row for row in found[part] if row["who"] == who]
            measured = {(row["work"], row["jitter"]) for row in rows if "work" in row}
            if "threads" in who:
                assert bool(measured) == torch.cuda.is_available()
            elif "after crop" in who:
                assert measured == {work for work in wanted if work[1] == "crop"}
            else:
                assert measured == wanted or [row["note"][:4] for row in rows] == ["not "]
    assert {row["who"] for row in found["fidelity"]} == {
        f"{a}, {b}" for a in ("photos", "large") for b in ("torch", "dali")
    }


def test_glue_adds_up(indexes):
    args = argparse.Namespace(batch=3, rounds=1)
    for jitter in ("full_image", "crop"):
        rows = {row["who"]: row for row in benchmark.glue(args, indexes) if row["jitter"] == jitter}
        whole, total = rows.pop("loader and masks"), rows.pop("glue, sum")
        assert whole["share"] == 1
        for key in ("us_per_image", "share"):
            assert sum(row[key] for row in rows.values()) == pytest.approx(total[key])


def test_the_host_carries_the_batches_of_a_run_without_their_pixels(indexes):
    rows = {row["who"]: row for row in benchmark.host(argparse.Namespace(batch=3, rounds=2), indexes)}
    assert list(rows) == ["torch", "torch, handed over by a worker process", "dali"]
    for row in rows.values():
        assert row.get("note", "").startswith("not installed") or row["slowest"] <= row["img_per_s"] <= row["fastest"]
    # what was stubbed is itself again
    path = indexes / "photos.idx"
    assert loader.PIPELINES["torch"] is loader.torch_photo
    with pytest.raises(AssertionError), closing(open_loader(open_index(path), "torch", "off", batch=3)) as real:
        host.check(real, Plans(DataConfig(tail="wrap"), open_index(path), 3, 0, 0, 1))


def test_shards_are_of_the_large_photos(tmp_path):
    found, said = run(tmp_path, *FEW, "--only", "shards", "--who", "ours, torch")
    works = [(row["work"], row["jitter"]) for row in found["shards"] if "work" in row]
    assert works == [("decode", "off"), *(("two views", jitter) for jitter in benchmark.JITTERS)]
    assert "15.0 megapixels became 1.8" in said


def test_photos_are_what_they_are_said_to_be(tmp_path):
    benchmark.make_photos(tmp_path)
    for name, low, high in (("photos", 187_500, 187_500), ("large", 2e6, 4e6)):
        build_index(tmp_path / name, tmp_path / "some.idx", progress=False)
        index = open_index(tmp_path / "some.idx")
        pixels = index.heights.astype(int) * index.widths
        assert len(index) >= 5 and low <= pixels.min() and pixels.max() <= high
        # in bytes a pixel, of photos: neither flat nor noise
        assert 0.3 < index.sizes.sum() / pixels.sum() < 0.7


def test_psnr_is_a_mean_over_images():
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    grey = black.clone()
    grey[1] = 5
    assert benchmark.mean_psnr([(black, black)]) == pytest.approx(78.13, abs=0.01)
    assert benchmark.mean_psnr([(black, grey)]) == pytest.approx((78.13 + 34.15) / 2, abs=0.01)


def test_aims_are_judged():
    rates = [
        dict(who="ours, torch", work="two views", jitter="crop", times=3.9),
        dict(who="ours, torch", work="two views", jitter="full_image", times=1.6),
        dict(who="ours, dali", work="two views", jitter="crop", times=9.0),
        dict(who="ours, torch", work="one view", jitter="crop", times=9.0),
    ]
    found = {
        "photos": rates,
        "glue": [dict(who="glue, sum", jitter="crop", share=0.04), dict(who="masks", jitter="crop", share=0.9)],
        "host": [
            dict(who="torch", img_per_s=9000.0),
            dict(who="dali", note="x"),
            dict(who="by a worker", img_per_s=1.0),
        ],
        "fidelity": [dict(who="photos, dali", jitter="off", patch_view_db=50.0, token_view_db=37.0)],
    }
    judged = [(row["value"], row["aim"], row["reached"]) for row in benchmark.aims(found)]
    assert judged == [(3.9, 4, False), (1.6, 1.5, True), (0.04, 0.05, True), (9000, 6400, True), (37, 38, False)]
