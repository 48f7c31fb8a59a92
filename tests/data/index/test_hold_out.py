"""`fastbeit index --hold-out`: two indices, none of whose images is in both."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastbeit.cli import main
from fastbeit.data.index.reader import Index, open_index
from helpers import photos
from helpers.archived import write_tar

SIZES = {"ant": 40, "bee": 25, "cow": 5, "dog": 1}


def image(number: int) -> bytes:
    colour = tuple(int(part) for part in np.random.default_rng(number).integers(0, 256, 3))
    return photos.encoded(photos.Image.new("RGB", (8 + number % 5, 8), colour), "PNG")


@pytest.fixture
def folder(tmp_path) -> Path:
    number = 0
    for name, size in SIZES.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(size):
            (tmp_path / "data" / name / f"{i:02}.png").write_bytes(image(number := number + 1))
    return tmp_path / "data"


def divided(source: Path, output: Path, *options: str) -> tuple[Index, Index]:
    assert main(["index", str(source), "-o", str(output), *options]) == 0
    return open_index(output.with_suffix(".train.idx")), open_index(output.with_suffix(".val.idx"))


def contents(index: Index) -> list[bytes]:
    return [index.read_bytes(i) for i in range(len(index))]


def names(index: Index) -> set[str]:
    return {index.name(i) for i in range(len(index))}


def test_two_indices_that_share_no_image(folder, tmp_path, capsys):
    train, val = divided(folder, tmp_path / "images.idx", "--hold-out", "0.2")
    assert not names(train) & names(val) and len(names(train) | names(val)) == sum(SIZES.values())
    assert not set(contents(train)) & set(contents(val))
    # each class to within one image, with the same number in both, though of one none is held out
    assert train.class_names == val.class_names == list(SIZES)
    counts = np.bincount(val.labels, minlength=4)
    assert all(abs(count - 0.2 * size) <= 1 for count, size in zip(counts, SIZES.values(), strict=True))
    assert counts[3] == 0 and abs(len(val) - 0.2 * sum(SIZES.values())) <= 1
    assert [val.class_names[label] for label in val.labels] == [val.path(i).parent.name for i in range(len(val))]
    said = capsys.readouterr().out
    assert f"{tmp_path}/images.train.idx: {len(train)} images\n" in said
    assert f"{tmp_path}/images.val.idx: {len(val)} images\n" in said
    assert sorted(os.listdir(tmp_path)) == ["data", "images.train.idx", "images.val.idx"]


def test_it_follows_from_content_and_seed(folder, tmp_path):
    _, val = divided(folder, tmp_path / "images.idx", "--hold-out", "0.2")
    _, again = divided(folder, tmp_path / "again.idx", "--hold-out", "0.2")
    assert again.fingerprint == val.fingerprint
    _, other = divided(folder, tmp_path / "other.idx", "--hold-out", "0.2", "--seed", "1")
    assert names(other) != names(val)
    # other names, same content
    held_out = sorted(contents(val))
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_name(f"{99 - int(path.stem)}.png"))
    _, renamed = divided(folder, tmp_path / "renamed.idx", "--hold-out", "0.2")
    assert sorted(contents(renamed)) == held_out


def test_copies_of_an_image_stay_together(folder, tmp_path):
    for path in sorted(folder.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
        # in another class too
        shutil.copy(path, folder / "cow" / f"{path.parent.name} {path.name}")
    train, val = divided(folder, tmp_path / "images.idx", "--hold-out", "0.3")
    assert len(train) + len(val) == 3 * sum(SIZES.values()) and len(val) > 40
    assert not set(contents(train)) & set(contents(val))


def test_images_in_an_archive(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i % 2}/{i:02}.png", image(i)) for i in range(40)])
    train, val = divided(tmp_path / "a.tar", tmp_path / "images.idx", "--hold-out", "0.25")
    assert (len(train), len(val)) == (30, 10) and np.bincount(val.labels).tolist() == [5, 5]
    assert sorted(contents(train) + contents(val)) == sorted(image(i) for i in range(40))
    for index in (train, val):
        for i in range(len(index)):
            assert index.read_bytes(i) == image(int(index.inner_name(i)[-6:-4]))


@pytest.mark.parametrize(
    "share, code, words", [("0", 2, "between 0 and 1"), ("1.5", 2, "between"), ("0.001", 66, "few")]
)
def test_shares_that_cannot_be_held_out(folder, tmp_path, capsys, share, code, words):
    args = ["index", str(folder), "-o", str(tmp_path / "images.idx"), "--hold-out", share]
    try:
        assert main(args) == code
    except SystemExit as err:
        assert err.code == code
    assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["data"]
