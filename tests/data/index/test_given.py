"""A folder in place of an index: when it is listed, where, and what of that stays."""

import os
from pathlib import Path

import pytest

from fastbeit.config.sections import DataConfig
from fastbeit.data.index import given
from fastbeit.data.index.given import index_sources, indexed_for_now, kept_or_gone, missing
from fastbeit.data.index.reader import open_index
from fastbeit.errors import DataError, RunError
from helpers import photos

JPEG = photos.encoded(photos.small_photo(24, 32))


def alone(make):
    return make()


def folder_of(path: Path, num_images: int) -> Path:
    path.mkdir()
    for i in range(num_images):
        (path / f"{i}.jpg").write_bytes(JPEG)
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def take(run: Path, is_begun: bool = False, **paths) -> tuple[DataConfig, list[str]]:
    return index_sources(
        DataConfig.model_validate({key: str(path) for key, path in paths.items()}), run, is_begun, alone
    )


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_both_sources_are_indexed_into_the_run_and_what_was_left_out_is_listed(tmp_path, run):
    train, val = folder_of(tmp_path / "train", 3), folder_of(tmp_path / "val", 2)
    (train / "x.jpg").write_bytes(b"no image")
    data, lines = take(run, index=train, val_index=val / "*.jpg")
    assert (data.index, data.val_index) == (str(run / "indices/train.idx"), str(run / "indices/val.idx"))
    assert (len(open_index(Path(data.index))), len(open_index(Path(data.val_index)))) == (3, 2)
    made = ["train.idx", "train.idx.skipped", "train.idx.source", "val.idx", "val.idx.source"]
    assert names(run / "indices") == made
    assert lines[0].startswith(f"images: '{data.index}' was made of '{train}': 3 images, 1 file skipped")
    assert lines[0].endswith(f"listed in '{data.index}.skipped'") and lines[1].startswith("held-out images: ")


def test_an_index_is_taken_as_it_is_and_nothing_is_written(tmp_path, run, monkeypatch):
    data, _ = take(run, index=folder_of(tmp_path / "photos", 2))
    os.rename(run / "indices", tmp_path / "elsewhere")
    index = tmp_path / "elsewhere/train.idx"
    assert take(run, index=index) == (DataConfig(index=str(index)), [])
    # also one that is gone, or damaged: it is told as such when it is opened
    assert take(run, index=tmp_path / "gone.idx")[0].index == str(tmp_path / "gone.idx")
    monkeypatch.setattr(given, "is_index", refuse)
    assert take(run, index=tmp_path / "locked")[0].index == str(tmp_path / "locked")
    assert names(run) == []


def refuse(path):
    raise PermissionError(13, "Permission denied")


def test_a_run_that_goes_on_does_not_look_at_its_source(tmp_path, run, monkeypatch):
    source = folder_of(tmp_path / "photos", 2)
    first, _ = take(run, index=source)
    (source / "new.jpg").write_bytes(JPEG)
    monkeypatch.chdir(tmp_path)
    # the same by another name
    again, (line,) = take(run, is_begun=True, index="./photos/")
    assert again == first and len(open_index(Path(again.index))) == 2
    assert line.endswith("made of 'photos' when the run began; what came there since is not looked for")
    os.rename(source, tmp_path / "moved")
    assert missing(DataConfig(index=str(source)), run) == []
    assert take(run, is_begun=True, index=source)[0] == first


def test_another_source_is_refused_by_a_run_that_has_begun(tmp_path, run):
    source, other = folder_of(tmp_path / "photos", 2), folder_of(tmp_path / "other", 3)
    take(run, index=source)
    with pytest.raises(
        RunError, match=f"was begun with the images of '{source}', and now '{other}' is named"
    ) as caught:
        take(run, is_begun=True, index=other)
    assert caught.value.exit_code == 2
    # nothing hangs on it yet: a source may be corrected
    assert len(open_index(Path(take(run, index=other)[0].index))) == 3
    assert len(open_index(Path(take(run, is_begun=True, index=other)[0].index))) == 3


def test_a_kill_while_another_source_is_indexed_leaves_no_index_of_the_first(tmp_path, run, monkeypatch):
    source, other = folder_of(tmp_path / "photos", 2), folder_of(tmp_path / "other", 3)
    take(run, index=source)

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(given, "build_index", killed)
    with pytest.raises(KeyboardInterrupt):
        take(run, index=other)
    monkeypatch.undo()
    assert len(open_index(Path(take(run, index=other)[0].index))) == 3


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "does not exist; an index is made of a folder of images"),
        ({}, "no image in "),
        ({"a.txt": b"text"}, "no image in .*1 file skipped, such as 'a.txt'"),
        (b"\0neither", "is no text; an index is made of a folder of images"),
        (b"nowhere.jpg\n", "no image in .*unreadable: No such file"),
    ],
    ids=["nothing", "empty folder", "no images", "neither", "list of nothing"],
)
def test_what_cannot_be_indexed_leaves_nothing(tmp_path, run, content, words):
    source = tmp_path / "source"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        source.mkdir()
        for name, data in content.items():
            (source / name).write_bytes(data)
    with pytest.raises(DataError, match=words) as caught, kept_or_gone(run, lambda: False):
        take(run, index=source)
    assert caught.value.exit_code == 66 and names(run) == []


def test_an_error_takes_back_what_this_start_made_and_no_more(tmp_path, run):
    train, val = folder_of(tmp_path / "train", 3), folder_of(tmp_path / "val", 2)
    for is_kept, stays in (True, ["val.idx", "val.idx.source"]), (False, []):
        for path in (run / "indices").glob("*"):
            path.unlink()
        take(run, index=train)
        with pytest.raises(ValueError), kept_or_gone(run, lambda is_kept=is_kept: is_kept):
            take(run, val_index=val)
            raise ValueError
        assert names(run / "indices") == ["train.idx", "train.idx.source", *stays]


def test_a_job_without_a_directory_keeps_nothing(tmp_path):
    source = folder_of(tmp_path / "photos", 2)
    with indexed_for_now(DataConfig(index=str(source))) as data:
        path = Path(data.index)
        assert len(open_index(path)) == 2
    assert not path.exists() and not path.parent.parent.exists()


def test_paths_that_lead_nowhere_are_said_all_at_once(tmp_path, run):
    data = DataConfig(index=str(tmp_path / "no.idx"), val_index=str(tmp_path / "nowhere"))
    first, second = missing(data, run)
    assert first == f"data.index: '{data.index}' does not exist; make it with `fastbeit index SOURCE -o {data.index}`"
    assert second.startswith(
        f"data.val_index: '{data.val_index}' does not exist; wanted an index, or a folder of images"
    )
    assert missing(DataConfig(index="nowhere/{1..3}.tar", val_index=""), run) == []
