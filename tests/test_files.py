"""Files are whole or not there, on any file system."""

import errno
import os
from pathlib import Path

import pytest

from fastbeit.files import (
    UNFINISHED,
    append_line,
    aside,
    move_folder,
    put_in_place,
    read_records,
    try_out,
    try_to_write,
    write_whole,
)
from helpers.faults import is_folder, is_there, odd_file_system, refuse


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "state"
    write_whole(path, "old")
    for call in os.fsync, os.replace:
        with monkeypatch.context() as patched:
            refuse(patched, call, errno.ENOSPC)
            with pytest.raises(OSError, match="No space left"):
                write_whole(path, "new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_it_is_written_aside_changes_nothing(tmp_path):
    path = tmp_path / "state"
    write_whole(path, "old")
    aside(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_lines_are_appended_and_the_unreadable_ones_are_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_records(path) == ([], "")
    path.write_bytes(b'{"a": 1}\n\n{"a": 2')
    append_line(path, '{"a": 3}')
    assert path.read_bytes() == b'{"a": 1}\n\n{"a": 2\n{"a": 3}\n'
    assert read_records(path) == ([{"a": 1}, {"a": 3}], f"line 3 of '{path}' cannot be read: passed over")
    for line in b"\0\0\0", b"\xff", b"[1]", b"7", b"[" * 100_000:
        path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": "\xc3\xa9"}\n' + line)
        records, problem = read_records(path)
        assert records == [{"a": 1}, {"a": "é"}] and problem.startswith("line 2 and 1 more of ")


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_a_file_system_does_not_know_is_done_without_and_said_once(tmp_path, monkeypatch, capsys):
    odd_file_system(monkeypatch)
    for text in "first", "second", "third":
        write_whole(tmp_path / "state", text)
        assert files_of(tmp_path) == {"state": text}
    for name in "a", "b":
        (tmp_path / "made" / name).mkdir(parents=True)
        write_whole(tmp_path / "made" / name / "file", name)
        move_folder(tmp_path / "made" / name, tmp_path / name)
    assert files_of(tmp_path) == {"state": "third", "a/file": "a", "b/file": "b"}
    said = capsys.readouterr().err.splitlines()
    words = [
        "fsync of folders (Invalid argument)",
        "chmod (Operation not permitted)",
        "renaming over a file (File exists)",
    ]
    words.append("renaming a folder (Too many open files)")
    assert len(said) == len(words)
    assert all(sum(f"has no {what}: " in line for line in said) == 1 for what in words)


def test_a_folder_that_is_moved_by_its_files_is_unfinished_until_all_are_there(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    for name in "a", "b":
        (tmp_path / "made" / name).write_text(name)
    refuse(monkeypatch, os.rename, errno.ENOSYS, lambda source, *_: is_folder(source) or Path(source).name == "b")
    with pytest.raises(OSError):
        move_folder(tmp_path / "made", tmp_path / "step")
    assert (tmp_path / "step" / UNFINISHED).exists()


@pytest.mark.parametrize("call", [os.fsync, os.chmod, os.replace], ids=lambda call: call.__name__)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_fails_is_not_done_without(tmp_path, monkeypatch, call, number):
    refuse(monkeypatch, call, number)
    with pytest.raises(OSError):
        write_whole(tmp_path / "state", "text")


def test_what_cannot_be_renamed_at_all_is_not_lost(tmp_path, monkeypatch):
    write_whole(tmp_path / "state", "old")
    aside(tmp_path / "state").write_text("new")
    for call in os.replace, os.rename:
        refuse(monkeypatch, call, errno.ENOSYS)
    with pytest.raises(OSError):
        put_in_place(tmp_path / "state")
    assert (tmp_path / "state").read_text() == "old"


@pytest.mark.parametrize("call", [os.mkdir, os.replace, os.rename], ids=lambda call: call.__name__)
def test_what_a_run_needs_is_tried_and_leaves_nothing(tmp_path, monkeypatch, call):
    try_out(tmp_path)
    assert not list(tmp_path.iterdir())
    refuse(monkeypatch, call, errno.EROFS)
    with pytest.raises(OSError, match="Read-only"):
        try_out(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    try_to_write(tmp_path / "a/b/page.html")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").write_text("a file where a folder should be")
    for path in tmp_path / "a/page.html", tmp_path:
        with pytest.raises(OSError):
            try_to_write(path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_replacement_is_tried_where_there_is_something_to_replace(tmp_path, monkeypatch):
    """An error of another kind is raised, also where the file is there."""
    refuse(monkeypatch, os.replace, errno.EACCES, is_there)
    write_whole(tmp_path / "state", "old")
    with pytest.raises(OSError, match="denied"):
        write_whole(tmp_path / "state", "new")
    assert files_of(tmp_path) == {"state": "old"}
