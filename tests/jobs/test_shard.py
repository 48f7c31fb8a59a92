"""Shards hold what the source held, smaller; whatever happens meanwhile."""

import json
import os
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbeit.cli import main
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.index.scan import build_index
from fastbeit.errors import ConfigError, RunError
from fastbeit.jobs import shard as sharding
from helpers import photos
from helpers.archived import write_tar
from helpers.loading import batches, psnr
from helpers.waiting import started, wait_until


def shards_of(source: Path, out: Path, *options: str, workers: int = 1) -> int:
    return main(["shard", str(source), "-o", str(out), "--workers", str(workers), *options])


def index_of(source: Path, path: Path) -> Index:
    build_index(source, path, progress=False)
    return open_index(path)


def names_of(index: Index) -> list[str]:
    return [os.fsdecode(index.inner_name(i)) for i in range(len(index))]


def classes_of(index: Index) -> list[str | None]:
    return [index.class_names[label] if label >= 0 else None for label in index.labels.tolist()]


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}  # pyright: ignore
    return found


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Photos in two classes, which are large; files of all kinds in a third; one name is no UTF-8."""
    files = {f"{'ab'[number % 2]}/{path.name}": path.read_bytes() for number, path in enumerate(photos.PHOTOS)}
    files |= {f"odd/{name}": data for name, (data, _) in photos.odd_files().items()}
    files[os.fsdecode(b"odd/\xe9t\xe9.jpg")] = photos.encoded(photos.small_photo())
    return folder_of(tmp_path_factory.mktemp("source") / "data", files)


# ---- a data set


@pytest.mark.parametrize("workers", [1, 2])
def test_the_shards_hold_the_source_under_its_names(source, tmp_path, capsys, workers):
    assert shards_of(source, tmp_path / "out", "--max-side", "128", workers=workers) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert set(os.listdir(tmp_path / "out")) == {".lock", "shard-000000.tar", "shards.json", "skipped_files.txt"}
    before, after = index_of(source, tmp_path / "before.idx"), index_of(tmp_path / "out", tmp_path / "after.idx")
    assert names_of(after) == names_of(before) and classes_of(after) == classes_of(before)
    assert np.minimum(after.heights, after.widths).max() == 128
    # the aspect ratio stays, to the rounding of a side of 128
    ratio = (after.heights / after.widths) / (before.heights / before.widths)
    large = np.minimum(before.heights, before.widths) > 128
    assert large.sum() >= 7 and np.abs(ratio[large] - 1).max() < 0.005
    for i in range(len(after)):
        was, now = before.read_bytes(i), after.read_bytes(i)
        assert (was == now) == (was.startswith(b"\xff\xd8\xff") and not large[i])
    num_copied = sum(before.read_bytes(i) == after.read_bytes(i) for i in range(len(after)))
    pixels = [(index.heights.astype(int) * index.widths).sum() / 1e6 for index in (before, after)]
    file_mb = (tmp_path / "out/shard-000000.tar").stat().st_size / 1e6
    assert said == (
        f"{len(before)} images in 1 shard in '{tmp_path / 'out'}', {num_copied} of them copied as they were: "
        f"{before.sizes.sum() / 1e6:,.1f} MB became {file_mb:,.1f}, {pixels[0]:,.1f} megapixels became {pixels[1]:,.1f}"
    )


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_training_sees_the_same_through_them(tmp_path, pipeline):
    """The same crops: boxes are shares of an image, so halving a photo of even sides halves its boxes, nearly."""
    files = {f"{number}.png": photos.encoded(photos.small_photo(512, 768), "PNG") for number in range(2)}
    folder_of(tmp_path / "data", files)
    assert shards_of(tmp_path / "data", tmp_path / "out", "--max-side", "256", "--quality", "95") == 0
    options = {"pipeline": pipeline, "batch_size": 2, "num_steps": 2, "crop_scale": (0.5, 1.0)}
    pairs = zip(
        batches(index_of(tmp_path / "data", tmp_path / "a.idx"), **options),
        batches(index_of(tmp_path / "out", tmp_path / "b.idx"), **options),
        strict=True,
    )
    for before, after in pairs:
        # files and the members of a tar come in another order
        ours, theirs = before.images[before.sample.argsort()], after.images[after.sample.argsort()]
        assert after.bad == [] and after.sample.sort().values.tolist() == [0, 1]
        # a box rounded to another pixel moves an edge: far from what another crop would give
        assert psnr(ours, theirs).min() > 24 > 16 > psnr(ours, theirs.flip(0)).max()


def test_classes_survive_whatever_wrote_them(tmp_path):
    jpeg = photos.encoded(photos.small_photo(24, 32))
    lists = {
        "names": ["a.jpg\tzebra", "b.jpg\tant", "c.jpg\t"],
        "numbers": ["a.jpg\t10", "b.jpg\t9", "c.jpg\t2"],
        "numbers that are names": ["a.jpg\t10", "b.jpg\t9", "c.jpg\tnine"],
        "one sample, two classes": ["k.1.jpg\tcat", "k.2.jpg\tdog", "b.jpg\tcat", "k.3.jpg\tcat"],
        "one sample, one class": ["k.1.jpg\tcat", "k.2.jpg\tcat", "b.jpg\tdog"],
        "twice the same": ["a.jpg\tcat", "a.jpg\tcat", "b.jpg\tcat", "a.jpg\tdog"],
    }
    for kind, lines in lists.items():
        folder = folder_of(tmp_path / kind, {line.split("\t")[0]: jpeg for line in lines})
        (folder / "list.txt").write_text("\n".join(lines))
        assert shards_of(folder / "list.txt", tmp_path / f"{kind}, shards") == 0
        before = index_of(folder / "list.txt", tmp_path / "before.idx")
        after = index_of(tmp_path / f"{kind}, shards", tmp_path / "after.idx")
        assert classes_of(after) == classes_of(before), kind
        if kind.startswith("numbers") or kind == "names":
            assert after.class_names == before.class_names and names_of(after) == names_of(before)
        # all are there, in their order, under names that end as they did
        assert [name.rpartition("/")[2] for name in names_of(after)] == names_of(before), kind


def test_archives_and_absolute_names_and_names_of_no_image(tmp_path):
    jpeg = photos.encoded(photos.small_photo(24, 32))
    (tmp_path / "tars").mkdir()
    for number in range(2):
        write_tar(tmp_path / f"tars/{number}.tar", [("x/a.jpg", jpeg), ("x/b", jpeg), ("x/b.cls", b"7")])
    assert shards_of(tmp_path / "tars", tmp_path / "out") == 0
    after = index_of(tmp_path / "out", tmp_path / "after.idx")
    assert names_of(after) == ["x/a.jpg", "x/b.jpg", "2/x/a.jpg", "3/x/b.jpg"]
    assert classes_of(after) == [None, "7", None, "7"]
    # outside of the list's folder
    folder_of(tmp_path / "data", {"a.jpg": jpeg, "..b.jpg": jpeg})
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/list.txt").write_text(f"../data/a.jpg\n{tmp_path}/data/..b.jpg\n")
    assert shards_of(tmp_path / "lists/list.txt", tmp_path / "out2") == 0
    found = names_of(index_of(tmp_path / "out2", tmp_path / "after.idx"))
    assert found == ["data/a.jpg", f"{tmp_path}/data/b.jpg".lstrip("/")]


def test_a_table_keeps_the_names_of_its_classes(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    noted = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["owl", "cat"]}}}}
    images = [{"bytes": photos.encoded(photos.small_photo(24, 30 + i), "PNG"), "path": None} for i in range(3)]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(images, struct), "label": pa.array([0, 1, -1], pa.int64())})
    table = table.replace_schema_metadata({b"huggingface": json.dumps(noted).encode()})
    pq.write_table(table, tmp_path / "train.parquet")
    assert shards_of(tmp_path / "train.parquet", tmp_path / "out") == 0
    after = index_of(tmp_path / "out", tmp_path / "after.idx")
    assert names_of(after) == ["row 0.jpg", "row 1.jpg", "row 2.jpg"] and after.widths.tolist() == [30, 31, 32]
    # numbers are those of the sorted names
    assert classes_of(after) == ["owl", "cat", None] and after.class_names == ["cat", "owl"]


def test_an_index_is_a_source(source, tmp_path):
    index_of(source, tmp_path / "images.idx")
    assert shards_of(tmp_path / "images.idx", tmp_path / "one") == 0
    assert shards_of(source, tmp_path / "other") == 0
    assert members(tmp_path / "one") == members(tmp_path / "other")
    assert not (tmp_path / "one/skipped_files.txt").exists()


def test_bad_images_are_left_out_and_listed(tmp_path, capsys):
    jpeg = photos.encoded(photos.small_photo(24, 32))
    files = {"a.jpg": jpeg, "b.jpg": photos.mid_corrupt_jpeg(), "c.jpg": jpeg, "d.txt": b"no image", "e.jpg": jpeg}
    folder_of(tmp_path / "data", files)
    index_of(tmp_path / "data", tmp_path / "images.idx")
    (tmp_path / "data/e.jpg").unlink()
    assert shards_of(tmp_path / "images.idx", tmp_path / "out") == 0
    assert list(members(tmp_path / "out")) == ["a.jpg", "c.jpg"]
    listed = (tmp_path / "out/bad_images.txt").read_text().splitlines()
    assert [line.partition("': ")[2].split(":")[0] for line in listed] == ["corrupt JPEG", "unreadable"]
    assert "b.jpg" in listed[0] and "e.jpg" in listed[1]
    assert "; 2 bad images are left out, listed in" in capsys.readouterr().out
    assert shards_of(tmp_path / "data", tmp_path / "out2") == 0
    assert "'d.txt': not an image" in (tmp_path / "out2/skipped_files.txt").read_text()
    # the last shard may have none that is good
    assert list(members(tmp_path / "out2")) == ["a.jpg", "c.jpg"]


def test_without_a_valid_image_there_are_no_shards(tmp_path, capsys):
    folder_of(tmp_path / "data", {"b.jpg": photos.mid_corrupt_jpeg()})
    assert shards_of(tmp_path / "data", tmp_path / "out") == 66
    assert "none of the 1 images is valid" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


# ---- shards of a size, and stops


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """60 photos, of 60 KB as they are."""
    folder = tmp_path_factory.mktemp("many") / "data"
    with Image.open(photos.CHINA) as photo:
        sizes = [(400 + 3 * number, 300 + 2 * number) for number in range(60)]
        folder_of(
            folder,
            {f"{n:02}/{n:03}.jpg": photos.encoded(photo.resize(size), quality=95) for n, size in enumerate(sizes)},
        )
    return folder


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert shards_of(many, out, "--shard-mb", "1") == 0
    return out


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def test_shards_have_their_size(many, whole, tmp_path):
    sizes = [path.stat().st_size for path in sorted(whole.glob("*.tar"))]
    # two blocks of end, rounded up to a record of 20 blocks
    assert len(sizes) >= 4 and max(sizes) <= 1_000_000 + 10_240 and min(sizes[:-1]) > 850_000
    assert names_of(index_of(whole, tmp_path / "images.idx")) == [f"{n:02}/{n:03}.jpg" for n in range(60)]


def test_a_finished_job_is_not_done_again(many, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"}
    assert shards_of(many, whole, "--shard-mb", "1") == 0
    assert "(were finished before)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir() if path.name != ".lock"} == before


def test_kill_9_and_again_gives_the_same_shards(many, whole, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "fastbeit",
        "shard",
        str(many),
        "-o",
        str(out),
        "--shard-mb",
        "1",
        "--workers",
        "1",
    ]
    for wanted in (1, 3):
        with started(command, start_new_session=True) as process:
            wait_until(process, lambda n=wanted: len(list(out.glob("shard-*.tar"))) >= n, pause_s=0.002)
            process.kill()
        # what is there under its name is whole
        for path in out.glob("shard-*.tar"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
        done = {path: path.stat().st_mtime_ns for path in sorted(out.glob("shard-*.tar"))[:-1]}
    assert shards_of(many, out, "--shard-mb", "1") == 0
    assert content(out) == content(whole)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())


@pytest.mark.parametrize("at", [2, 4])
def test_a_kill_between_a_shard_and_its_line_in_the_card(many, whole, tmp_path, monkeypatch, at):
    out, save, calls = tmp_path / "out", sharding._save, []

    def die(*args: object) -> sharding.Shards:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return save(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(sharding, "_save", die)
    assert shards_of(many, out, "--shard-mb", "1") == 130
    assert len(list(out.glob("*.tar"))) == at - 1
    monkeypatch.setattr(sharding, "_save", save)
    assert shards_of(many, out, "--shard-mb", "1") == 0
    assert content(out) == content(whole)


def test_a_signal_stops_it_and_says_how_to_go_on(many, whole, tmp_path, capsys, monkeypatch):
    out, shrinks = tmp_path / "out", sharding.Shrinks.__getitem__

    def shrink_some(self, rows: range) -> list:
        if rows.start >= 32:
            os.kill(os.getppid(), signal.SIGTERM)
        return shrinks(self, rows)

    monkeypatch.setattr(sharding.Shrinks, "__getitem__", shrink_some)
    assert shards_of(many, out, "--shard-mb", "1") == 75
    said = capsys.readouterr().err
    assert "of 60 images are in finished shards; to go on: fastbeit shard" in said and "--shard-mb 1" in said
    assert not [path for path in out.iterdir() if path.suffix == ".part"]
    assert 0 < len(list(out.glob("*.tar"))) < len(list(whole.glob("*.tar")))
    monkeypatch.setattr(sharding.Shrinks, "__getitem__", shrinks)
    assert shards_of(many, out, "--shard-mb", "1") == 0
    assert content(out) == content(whole)


def test_what_does_not_fit_is_refused(many, whole, tmp_path, capsys):
    for options, said in (
        (["--shard-mb", "2"], "shard_mb was 1, now 2"),
        (
            ["--shard-mb", "1", "--quality", "80", "--max-side", "99"],
            "max_side was 512, now 99; quality was 90, now 80",
        ),
    ):
        assert shards_of(many, whole, *options) == 2
        assert f"holds other shards: {said}" in capsys.readouterr().err
    assert shards_of(many.parent, whole, "--shard-mb", "1") == 2
    assert "holds other shards: source was" in capsys.readouterr().err
    folder_of(tmp_path / "full", {"notes.txt": b"mine"})
    assert shards_of(many, tmp_path / "full") == 2
    assert "is not empty and holds no shards, but notes.txt" in capsys.readouterr().err
    assert os.listdir(tmp_path / "full") == ["notes.txt"]
    with pytest.raises(SystemExit):
        shards_of(many, tmp_path / "none", "--max-side", "0")
    assert shards_of(tmp_path / "nowhere", tmp_path / "none/shards") == 66
    assert shards_of(tmp_path / "full", tmp_path / "none/shards") == 66
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda out: (out / "shard-000001.tar").unlink(), "shard-000001.tar' is gone or has changed"),
        (lambda out: os.truncate(out / "shard-000001.tar", 1000), "shard-000001.tar' is gone or has changed"),
        (lambda out: (out / "shards.json").write_text("{"), "shards.json' is damaged"),
        (
            lambda out: (out / "shards.json").write_text('{"format": "fastbeit-shards-7"}'),
            "has format fastbeit-shards-7",
        ),
    ],
    ids=["gone", "cut short", "damaged", "another version"],
)
def test_damage_is_refused_by_name(many, tmp_path, capsys, damage, said):
    assert shards_of(many, tmp_path / "out", "--shard-mb", "1") == 0
    damage(tmp_path / "out")
    assert shards_of(many, tmp_path / "out", "--shard-mb", "1") == 2
    assert said in capsys.readouterr().err


def test_a_start_that_is_refused_leaves_nothing(many, tmp_path, monkeypatch):
    def refuse(*args):
        raise ConfigError("12-bit data")

    monkeypatch.setattr(sharding, "open_index", refuse)
    settings = sharding.Settings(source=str(many), max_side=512, quality=90, shard_mb=1)
    with pytest.raises(ConfigError):
        sharding.shard(many, tmp_path / "out", settings, 1, ["fastbeit"])
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full(many, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharding, "put_in_place", full)
    settings = sharding.Settings(source=str(many), max_side=512, quality=90, shard_mb=1)
    with pytest.raises(RunError, match="cannot be written to .*No space left") as caught:
        sharding.shard(many, tmp_path / "out", settings, 1, ["fastbeit"])
    assert caught.value.exit_code == 74
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_card_adds_up(whole, tmp_path):
    card = json.loads((whole / "shards.json").read_text())
    index = index_of(whole, tmp_path / "images.idx")
    assert sum(shard["images"] for shard in card["shards"]) == len(index) == card["num_images"]
    assert sum(shard["pixels_after"] for shard in card["shards"]) == int(
        (index.heights.astype(int) * index.widths).sum()
    )
