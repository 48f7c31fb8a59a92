import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastbeit.data.index.scan import build_index
from fastbeit.errors import DataError, RunError
from fastbeit.jobs import check_index as checking
from fastbeit.jobs.check_index import check_index
from helpers import photos
from helpers.waiting import PATIENCE_S, started

GOOD = photos.encoded(photos.small_photo(24, 32))
NOISY = photos.mid_corrupt_jpeg()  # whole at both ends, so that an index takes it


def make_index(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(data)
    build_index(folder / "data", folder / "images.idx", progress=False)
    return folder / "images.idx"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_are_good(tmp_path, capsys, num_workers):
    path = make_index(tmp_path, {f"{i}.jpg": GOOD for i in range(100)})
    (tmp_path / "images.idx.bad").write_text("of another time")
    assert check_index(path, num_workers) == 0
    assert re.fullmatch(
        r"the index is the one .*\n100 images decoded in \d+\.\d s, \d+ img/s: all are good\n", capsys.readouterr().out
    )
    assert sorted(os.listdir(tmp_path)) == ["data", "images.idx", "images.idx.checked"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_listed_with_their_reasons(tmp_path, capsys, num_workers):
    files = {f"{i:03}.jpg": GOOD for i in range(100)} | {"x\ny.jpg": NOISY}
    path = make_index(tmp_path, files)
    data = tmp_path / "data"
    (data / "007.jpg").write_bytes(GOOD[:-9])
    (data / "050.jpg").unlink()
    (data / "070.jpg").write_bytes(b"no JPEG".ljust(len(GOOD)))
    assert check_index(path, num_workers) == 65
    assert re.fullmatch(
        r"the index is the one .*\n101 images decoded in .*: 4 are bad, listed in '.*images.idx.bad'; .*\n",
        capsys.readouterr().out,
    )
    listed = (tmp_path / "images.idx.bad").read_text().splitlines()
    assert [line.partition("': ")[0] for line in listed] == [
        repr(str(data / name))[:-1] for name in ("007.jpg", "050.jpg", "070.jpg", "x\ny.jpg")
    ]
    reasons = "changed since it was indexed", "unreadable: No such file", "but others", "corrupt JPEG"
    assert all(reason in line for reason, line in zip(reasons, listed, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_that_is_gone(tmp_path, num_workers):
    path = make_index(tmp_path, {f"{i}.jpg": GOOD for i in range(3)})
    (tmp_path / "images.idx.bad").write_text("of another time")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match="data' is gone, or not mounted") as caught:
        check_index(path, num_workers)
    assert caught.value.exit_code == 66
    assert sorted(os.listdir(tmp_path)) == ["images.idx", "images.idx.bad"]


def test_no_index(tmp_path):
    with pytest.raises(DataError, match="no index"):
        check_index(tmp_path / "images.idx", 0)


def test_a_list_that_cannot_be_written(tmp_path, monkeypatch):
    path = make_index(tmp_path, {"x.jpg": GOOD})
    monkeypatch.setattr(checking, "aside", lambda path: tmp_path / "nowhere" / path.name)
    with pytest.raises(RunError, match="what was found, .*images.idx.bad., cannot be written") as caught:
        check_index(path, 0)
    assert caught.value.exit_code == 73


def test_a_decoder_that_falls(tmp_path, monkeypatch):
    path = make_index(tmp_path, {f"{i:03}.jpg": GOOD for i in range(100)})
    parent = os.getpid()

    def fall(data, size):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(checking, "check", fall)
    with pytest.raises(RunError, match=r"was killed by signal 9: .*one of the images from '.*000.jpg' on"):
        check_index(path, 2)


def test_it_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    path = make_index(tmp_path, {f"{i:03}.jpg": GOOD for i in range(90)} | {"x.jpg": NOISY})
    monkeypatch.setattr("fastbeit.data.progress.SAY_EVERY_S", 0.0)
    check_index(path, 0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" img")[0] for line in lines] == ["32/91", "64/91", "91/91"]
    assert re.fullmatch(r"91/91 img  1 bad  \d+ img/s  ETA 00:00", lines[-1])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are listed by Linux")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_stopped(tmp_path, number):
    photo = photos.CHINA.read_bytes()
    path = make_index(tmp_path, {f"{i:04}.jpg": photo for i in range(1500)})
    code = (
        "import sys; from pathlib import Path; from fastbeit.data import progress\n"
        "from fastbeit.jobs import check_index as check\n"
        "progress.SAY_EVERY_S = 0\n"
        "try: check.check_index(Path(sys.argv[1]), 2)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    with started([sys.executable, "-c", code, str(path)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        first = process.stderr.readline()
        assert "/1,500 img" in first, first
        workers = children(process.pid)
        process.send_signal(number)
        _, rest = process.communicate(timeout=PATIENCE_S)
    # it did not go on to the end first
    assert process.returncode == 130 and "1500/1,500" not in rest and "Traceback" not in rest
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert sorted(os.listdir(tmp_path)) == ["data", "images.idx"]
