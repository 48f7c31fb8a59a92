"""`fastbeit features`: rows in the order of the index, whole files or none, and little memory."""

import json
import os
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import fastbeit
from fastbeit.cli import main
from fastbeit.data.index.reader import open_index
from fastbeit.errors import DATA_MISSING, USAGE
from fastbeit.evaluate.feature_file import RowFile
from helpers import photos
from helpers.dialects import WIDTH, pretrained_run
from helpers.tiny import make_photos


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, and photos in two classes, one of which becomes damaged after it was indexed."""
    folder = tmp_path_factory.mktemp("features")
    pretrained_run(folder / "run")
    for name, number in (("cats", 3), ("dogs", 4)):
        make_photos(folder / "photos" / name, number)
    (folder / "photos/dogs/01.jpg").write_bytes(photos.mid_corrupt_jpeg())
    assert main(["index", str(folder / "photos"), "-o", str(folder / "images.idx")]) == 0
    return folder


def features(place, source, out, *more):
    return main(["features", str(place / "run"), str(source), "-o", str(out), "--workers", "0", *more])


@pytest.mark.parametrize("source", ["images.idx", "photos"])
def test_rows_are_in_the_order_of_the_index_and_bad_images_have_none(place, source, tmp_path, capsys):
    out = tmp_path / "new" / "features.safetensors"
    assert features(place, place / source, out, "--kind", "concat", "--blocks", "1,0") == 0
    said = capsys.readouterr().out
    assert "6 rows, concat of block 0, 1" in said and "1 bad image left out, listed in" in said
    assert {path.name for path in out.parent.iterdir()} == {
        "features.safetensors", "features.paths.json", "features.bad",
    }  # fmt: skip
    found, index = load_file(out), open_index(place / "images.idx")
    assert found.keys() == {"block_0", "block_1", "row", "label"}
    assert found["row"].tolist() == [0, 1, 2, 3, 5, 6] and found["label"].tolist() == [0, 0, 0, 1, 1, 1]
    paths = json.loads((out.parent / "features.paths.json").read_text())
    assert paths == [index.name(i) for i in found["row"]]
    assert "dogs/01.jpg: corrupt" in (out.parent / "features.bad").read_text()
    with safe_open(out, "np") as file:
        metadata = file.metadata()
    assert metadata["index"] == index.fingerprint and json.loads(metadata["class_names"]) == ["cats", "dogs"]
    assert metadata["kind"] == "concat" and metadata["norm"] == "none"
    wanted = fastbeit.load(place / "run").features(paths, blocks=[0, 1], kind="concat")
    assert isinstance(wanted, dict)
    for block in (0, 1):
        np.testing.assert_allclose(found[f"block_{block}"], wanted[block].numpy(), atol=1e-5, rtol=1e-5)


def test_a_later_call_leaves_nothing_of_an_earlier_one(place, tmp_path):
    out = tmp_path / "features.safetensors"
    assert features(place, place / "images.idx", out) == 0 and (tmp_path / "features.bad").exists()
    assert features(place, place / "photos/cats", out, "--kind", "patches") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"features.safetensors", "features.paths.json"}
    found = load_file(out)
    assert found.keys() == {"block_1", "row"} and found["block_1"].shape == (3, 4, 4, WIDTH)


@pytest.mark.parametrize(
    "more, code, message",
    [
        (["--blocks", "2"], USAGE, "block 2 is wanted of a model of 2, which are 0 to 1"),
        (["--blocks", "last"], USAGE, "argument --blocks: wanted numbers"),
        (["--mean", "0.5"], USAGE, "--mean: expected 3 arguments"),
    ],
)
def test_a_mistake_ends_in_its_exit_code_and_leaves_nothing(place, tmp_path, capsys, more, code, message):
    try:
        found = features(place, place / "images.idx", tmp_path / "features.safetensors", *more)
    except SystemExit as end:
        found = end.code
    assert found == code and message in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_images_that_are_all_bad_leave_nothing(place, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(photos.mid_corrupt_jpeg())
    assert features(place, tmp_path / "bad", out / "features.safetensors") == DATA_MISSING
    assert "none of the 1 images" in capsys.readouterr().err and not [*out.iterdir()]


@pytest.mark.parametrize("moment", ["look_at", "finish"])
def test_a_stop_leaves_the_earlier_files_or_none(place, tmp_path, monkeypatch, moment):
    """In the middle of the images those of an earlier call stay; at the end there are no rows beside other paths."""
    out = tmp_path / "features.safetensors"
    assert features(place, place / "photos/cats", out) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if moment == "look_at":
        monkeypatch.setattr("fastbeit.jobs.features.features_of", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    else:
        monkeypatch.setattr(RowFile, "finish", lambda *_: (_ for _ in ()).throw(OSError(28, "no room")))
    assert features(place, place / "photos/dogs", out) == (130 if moment == "look_at" else 74)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == before if moment == "look_at" else "features.safetensors" not in left
    assert not [name for name in left if name.endswith(".part")]


def test_a_file_of_rows_is_never_in_memory(tmp_path):
    """40 MB, 256 KB at a time; tensors of 8-byte numbers begin at multiples of 8."""
    rows = np.ones((64, 1024), np.float32)
    number = np.arange(64, dtype=np.int64)
    tracemalloc.start()
    with RowFile(tmp_path / "x.safetensors") as file:
        for _ in range(160):
            file.add({"rows": rows, "number": number})
        file.finish({"said": "é"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    found = load_file(tmp_path / "x.safetensors")
    assert found["rows"].shape == (160 * 64, 1024) and (found["rows"] == 1).all()
    assert np.array_equal(found["number"], np.tile(number, 160))
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"said": "é"} and torch.equal(opened.get_tensor("number")[:64], torch.arange(64))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_wide_numbers_begin_at_multiples_of_their_width(tmp_path):
    with RowFile(tmp_path / "x.safetensors") as file:
        file.add({"a": np.ones((3, 1), np.float32), "b": np.arange(3)})
        file.finish({})
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length + header["b"]["data_offsets"][0]) % 8 == 0
    assert load_file(tmp_path / "x.safetensors")["b"].tolist() == [0, 1, 2]
