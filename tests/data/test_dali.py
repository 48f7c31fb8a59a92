"""What DALI is given, and what becomes of a run when DALI fails."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbeit.config.sections import DataConfig
from fastbeit.data import decode as decoding
from fastbeit.data.decode import check
from fastbeit.data.index import checked
from fastbeit.data.index.checked import read_checked
from fastbeit.data.index.reader import Index, open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.loader import make_loader, make_token_loader
from fastbeit.errors import RunError
from fastbeit.jobs.check_index import check_index
from fastbeit.jobs.index import index as make_index
from fastbeit.train.stop import Stop
from helpers import photos
from helpers.caches import configured
from helpers.loading import assert_same, batches
from helpers.tiny import make_parts, make_photos, write_config
from helpers.waiting import PATIENCE_S

graph = pytest.importorskip("fastbeit.data.dali_graph")
OPTIONS: dict[str, Any] = {"pipeline": "dali", "batch_size": 5, "num_steps": 4, "tail": "wrap"}


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    """Few bytes of a file are compared when it is read, as of a large one: damage between them is for DALI to meet."""
    monkeypatch.setattr("fastbeit.data.index.members.SAMPLE_BYTES", 16)


@pytest.fixture
def index(tmp_path) -> Index:
    """Twelve photos of 80 x 64, which `fastbeit index check` has passed."""
    build_index(make_photos(tmp_path / "photos"), tmp_path / "images.idx", progress=False)
    assert check_index(tmp_path / "images.idx", 0) == 0
    return open_index(tmp_path / "images.idx")


def unchecked(index: Index) -> Index:
    checked.checked_path(index.location).unlink()
    return index


def refused_by_dali(path: Path) -> None:
    """Damage a JPEG between its header and its end so that DALI raises; its length stays."""
    # its tables of quantization become comments
    path.write_bytes(path.read_bytes().replace(b"\xff\xdb", b"\xff\xfe"))


@pytest.fixture
def decodes(monkeypatch) -> list[int]:
    """The bytes of each JPEG that simplejpeg decodes."""
    seen, decode_jpeg = [], decoding.simplejpeg.decode_jpeg

    def counted(data: bytes, *args: Any, **options: Any) -> np.ndarray:
        seen.append(len(data))
        return decode_jpeg(data, *args, **options)

    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg", counted)
    return seen


# ---- what was checked before


@pytest.mark.parametrize("jitter_on", ["full_image", "crop"])
def test_an_image_that_was_checked_is_decoded_once_and_gives_the_same(index, decodes, jitter_on):
    known = batches(index, jitter_on=jitter_on, **OPTIONS)
    assert not decodes
    scanned = batches(unchecked(index), jitter_on=jitter_on, **OPTIONS)
    assert len(decodes) >= 20
    assert_same(known, scanned)


def test_the_check_remembers_the_grey_of_every_kind_of_file(tmp_path):
    (tmp_path / "data").mkdir()
    for name, (data, _) in photos.odd_files().items():
        (tmp_path / "data" / name).write_bytes(data)
    (tmp_path / "data" / "noisy.jpg").write_bytes(photos.mid_corrupt_jpeg())
    make_index(tmp_path / "data", tmp_path / "images.idx")
    index = open_index(tmp_path / "images.idx")
    assert read_checked(index) is None
    assert check_index(index.location, 0) == 65
    found = read_checked(index)
    assert found is not None and found.dtype == np.float64 and len(found) == len(index)
    for i in range(len(index)):
        if index.path(i).name == "noisy.jpg":
            assert np.isnan(found[i])
        else:
            size = int(index.heights[i]), int(index.widths[i])
            assert found[i] == check(index.read_bytes(i), size).mean_grey
    # and files of all kinds go the short way as they go the long one
    options = {"pipeline": "dali", "batch_size": len(index), "num_steps": 1}
    known = batches(index, **options)
    assert_same(known, batches(unchecked(index), **options))
    assert len(known[0].bad) == 1


def test_a_bad_image_stays_bad(index):
    path = index.path(3)
    path.write_bytes(path.read_bytes()[:700].ljust(path.stat().st_size, b"\0"))
    assert check_index(index.location, 0) == 65
    known = batches(index, **OPTIONS)
    assert {i for batch in known for i, _ in batch.bad} == {3}
    assert_same(known, batches(unchecked(index), **OPTIONS))


@pytest.mark.parametrize("change", ["another size", "no end", "no JPEG"])
def test_header_and_end_are_looked_at_all_the_same(index, change):
    path = index.path(0)
    length = path.stat().st_size
    data = {
        "another size": photos.encoded(photos.small_photo(64, 88)).ljust(length, b"\0")[:length],
        "no end": path.read_bytes()[: length // 2].ljust(length, b"\0"),
        "no JPEG": b"x" * length,
    }[change]
    path.write_bytes(data)
    found = {i for batch in batches(index, **OPTIONS) for i, _ in batch.bad}
    assert found == {0}


def test_what_was_found_of_another_index_says_nothing(index, tmp_path):
    build_index(make_photos(tmp_path / "others", 11), index.location, progress=False)
    assert read_checked(open_index(index.location)) is None
    # the same images, indexed again: a file may have been repaired since
    assert check_index(index.location, 0) == 0
    make_index(tmp_path / "others", index.location)
    assert read_checked(open_index(index.location)) is None


DEEP = (200_000).to_bytes(8, "little") + b"[" * 200_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:60],
        lambda data: b"",
        lambda data: data[:-8],
        lambda data: bytes(len(data)),
        lambda data: b"\xff" * len(data),
        lambda data: (2).to_bytes(8, "little") + b"[]" + data,
        lambda data: DEEP,
        lambda data: data[:-3] + b"\x40" + data[-2:],
        lambda data: data.replace(b"fastbeit-checked-2", b"fastbeit-checked-1"),
    ],
    ids=["cut", "empty", "short", "nulls", "no UTF-8", "list", "deep", "flipped", "former version"],
)
def test_a_damaged_file_is_passed_over_and_said(index, decodes, capsys, damage):
    scanned = batches(unchecked(index), **OPTIONS)
    num_decodes = len(decodes)
    assert check_index(index.location, 0) == 0
    path = checked.checked_path(index.location)
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    decodes.clear()
    assert_same(batches(index, **OPTIONS), scanned)
    said = capsys.readouterr().err
    assert "images.idx.checked' is passed over (" in said and "fastbeit index check " in said
    # as those of an index that was never checked
    assert len(decodes) >= num_decodes


# ---- when DALI fails


def said_of(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("DALI failed (")]


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("bad", [[4], [4, 5], [0, 4, 11]])
def test_a_file_that_dali_fails_at_is_named_and_replaced(index, capfd, bad, num_workers):
    for i in bad:
        refused_by_dali(index.path(i))
    options = {**OPTIONS, "num_workers": num_workers}
    found = batches(index, **options)
    # at once for a batch, or while the one before it is waited for, in which nothing is found then
    said = [line for line in said_of(capfd) if "every file of this batch is valid" not in line]
    # each time that one of them is met
    met = [batch for batch in found if batch.bad]
    assert len(said) == len(met)
    for batch, line in zip(met, said, strict=True):
        assert all(f"{index.path(i)}: corrupt JPEG" in line for i, _ in batch.bad) and "was built again" in line
    # as where every file is scanned before
    scanned = batches(unchecked(index), **options)
    assert not said_of(capfd)
    assert_same(found, scanned)
    assert [batch.bad for batch in found] == [batch.bad for batch in scanned]
    assert {i for batch in found for i, _ in batch.bad} == set(bad)


def test_token_views_survive_too(index, capfd):
    def views() -> list:
        data = DataConfig.model_validate({"pipeline": "dali", "num_crops": 2, "num_workers": 0, "image_size": 32})
        loader = make_token_loader(data, index, token_size=(16, 24), seed=5, rows=[range(12)], together=3)
        return [(made.rows, made.images, made.bad) for made in loader]

    for i in (3, 4, 5, 7):
        refused_by_dali(index.path(i))
    found = views()
    assert sum("; bad: " in line for line in said_of(capfd)) == 2
    unchecked(index)
    for (rows, images, bad), (other_rows, other_images, other_bad) in zip(found, views(), strict=True):
        assert rows == other_rows and torch.equal(images, other_images) and bad == other_bad
    # a batch without any good image among them
    assert [len(bad) for _, _, bad in found] == [0, 3, 1, 0]


NO_JPEG = np.frombuffer(b"\xff\xd8\xff\xe0 no JPEG", np.uint8)


class Faulty:
    """A DALI pipeline that can be made to fail."""

    def __init__(self, pipeline: Any, spoils: Any = None, raises: Any = None) -> None:
        self._pipeline, self._spoils, self._raises = pipeline, spoils, raises

    def feed_input(self, name: str, values: Any) -> None:
        if name == "encoded" and self._spoils:
            values = [NO_JPEG if self._spoils(one) else one for one in values]
        self._pipeline.feed_input(name, values)

    def share_outputs(self) -> Any:
        if self._raises:
            self._raises()
        return self._pipeline.share_outputs()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)


@pytest.fixture
def faulty(monkeypatch):
    """Every pipeline from now on has these faults; gives the list of those that are built."""

    def faulty(**faults: Any) -> list[Faulty]:
        built, build = [], graph.Views._build

        def build_faulty(views: Any) -> Faulty:
            built.append(Faulty(build(views), **faults))
            return built[-1]

        monkeypatch.setattr(graph.Views, "_build", build_faulty)
        return built

    return faulty


@pytest.mark.parametrize("at", [1, 2, 4])
def test_an_error_that_no_file_causes_changes_nothing(index, faulty, capfd, at):
    whole, calls = batches(index, **OPTIONS), []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == at:
            raise MemoryError("out of something")

    built = faulty(raises=fail_once)
    assert_same(batches(index, **OPTIONS), whole)
    assert len(built) == 2
    assert "DALI failed (out of something); every file of this batch is valid; its pipeline" in "".join(said_of(capfd))


def test_a_valid_file_that_dali_does_not_take_is_decoded_here(index, faulty, capfd):
    whole = batches(index, **OPTIONS)
    shown = [set(batch.sample.tolist()) for batch in whole]
    # in two batches, the second of which is begun when the first fails
    (row, *_) = [row for one, two in zip(shown, shown[1:], strict=False) for row in one & two]
    target = index.path(row).read_bytes()
    faulty(spoils=lambda array: array.tobytes() == target)
    found = batches(index, **OPTIONS)
    assert_same(found, whole)
    assert not any(batch.bad for batch in found)
    (said,) = [line for line in said_of(capfd) if "every file of this batch is valid; its pipeline" not in line]
    assert f"from now on decoded without it: {index.path(row)}; its pipeline was built again" in said


def test_it_says_what_to_do_when_nothing_helps(index, faulty):
    faulty(spoils=lambda array: True)
    with pytest.raises(RunError, match="DALI gave up on images that had been checked; take data.pipeline=torch"):
        batches(index, **OPTIONS)


def test_it_says_so_too_when_there_is_no_other_pipeline(index, monkeypatch):
    refused_by_dali(index.path(4))
    built, build = [], graph.Views._build

    def build_once(views: Any) -> Any:
        if built:
            raise RuntimeError("an error of the device, which lasts")
        built.append(1)
        return build(views)

    monkeypatch.setattr(graph.Views, "_build", build_once)
    with pytest.raises(RunError, match="DALI gave up on .*: an error of the device, which lasts"):
        batches(index, **OPTIONS)


def test_a_training_goes_on_and_lists_the_file(tmp_path, monkeypatch):
    from fastbeit.jobs.pretrain import pretrain

    parts = {**make_parts(tmp_path / "parts"), "config": str(write_config(tmp_path / "tiny.yaml")), "data.num_crops": 0}
    path = tmp_path / "parts/images.idx"
    assert check_index(path, 0) == 0
    refused_by_dali(open_index(path).path(7))

    def losses(out: str) -> list[float]:
        config = configured(parts, data__pipeline="dali", out=tmp_path / out)
        assert pretrain(config, ["fastbeit"]) == 0
        lines = (json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "event" not in line]

    found = losses("known")
    (listed,) = (tmp_path / "known/bad_samples.jsonl").read_text().splitlines()
    assert json.loads(listed)["sample"] == 7 and "07.jpg: corrupt JPEG" in listed
    checked.checked_path(path).unlink()
    assert losses("scanned") == found and len(found) == 6


def test_a_stop_ends_the_wait_for_a_disk_that_does_not_answer(index, monkeypatch):
    """A thread of its own reads, and nothing ends that."""
    answers = threading.Event()

    def read(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        assert answers.wait(PATIENCE_S), "waited on"

    monkeypatch.setattr(Index, "read_bytes", read)
    data = DataConfig(pipeline="dali", image_size=(32, 32), num_workers=2)
    loader = make_loader(
        data, index, token_size=None, batch_size=4, seed=0, rank=0, world_size=1, first_step=0, num_steps=3
    )
    try:
        with Stop() as stop:
            assert [*stop.until_wanted(loader)] == []
    finally:
        answers.set()
