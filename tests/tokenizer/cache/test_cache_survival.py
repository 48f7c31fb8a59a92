"""What the making of a cache survives: kills, full disks, signals, ranks that come and go."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastbeit.cli import main
from fastbeit.data.index.scan import build_index
from fastbeit.errors import CacheError, RunError
from fastbeit.tokenizer.cache.reader import open_cache
from fastbeit.train import rundir
from fastbeit.train.rundir import hold
from helpers.caches import CHUNK_CROPS, NUM_IMAGES, VIEWS, edit, facts, files, make
from helpers.tiny import make_photos
from helpers.waiting import PATIENCE_S, wait_until


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def die_at(monkeypatch, number: int, error: BaseException) -> list[str]:
    """Let the job die at the n-th time that it asks the disk for something lasting; gives what it asked for.

    What it tries before it begins is left out.
    """
    asked = []

    def dying(name, original):
        def call(*args, **kwargs):
            asked.append(name)
            if len(asked) == number:
                raise error
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(rundir, "try_out", lambda folder: None)
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, dying(name, getattr(os, name)))
    return asked


def test_a_death_at_any_moment_costs_nothing(parts, tmp_path, monkeypatch):
    """At each sync and each rename of a job; then the same job again gives the same files."""
    few = {**parts, "data.index": tmp_path / "few.idx", "data.num_crops": 2}
    build_index(make_photos(tmp_path / "photos", 4), few["data.index"], progress=False)
    (tmp_path / "photos/03.jpg").write_bytes(b"")
    with monkeypatch.context() as patch:
        asked = die_at(patch, 0, Killed())
        make(few, tmp_path / "whole")
    # two chunks: two views and a journal each; the plan, two views, bad images and the card, each synced and renamed,
    # and the folder's names synced
    assert asked.count("fsync") == 2 * 3 + 5 * 2 and asked.count("replace") == 5
    for number in range(1, len(asked) + 1):
        folder = tmp_path / f"died-{number}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, number, Killed())
            make(few, folder)
        assert (folder / "tokens.json").exists() == (number == len(asked))
        assert make(few, folder) == 0
        assert files(folder) == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [1, 10, 33])
def test_a_full_disk_is_said_and_costs_nothing(parts, tokens, tmp_path, monkeypatch, number):
    folder = tmp_path / "tokens"
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        die_at(patch, number, full)
        with pytest.raises(RunError, match=r"tokens cannot be written to '.*tokens': .*No space left") as caught:
            make(parts, folder)
    assert caught.value.exit_code == 74
    assert make(parts, folder) == 0 and files(folder) == files(tokens)


def test_too_small_a_disk_is_said_before_anything_is_made(parts, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunError, match=r"want 1,536 bytes, and the disk has 1,000 free") as caught:
        make(parts, tmp_path / "tokens")
    assert caught.value.exit_code == 74
    assert "12 images x 3 crops x 16 tokens: 1,536 bytes" in capsys.readouterr().out
    assert not (tmp_path / "tokens").exists()


def test_a_place_that_is_not_ours_is_refused(parts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="data.tokens '.*' cannot be written") as caught:
        make(parts, tmp_path / "file/tokens")
    assert caught.value.exit_code == 73
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/to_mother.txt").write_text("dear")
    with pytest.raises(RunError, match="not empty and holds no tokens, but to_mother.txt") as caught:
        make(parts, tmp_path / "letters")
    assert caught.value.exit_code == 2 and os.listdir(tmp_path / "letters") == ["to_mother.txt"]


def test_two_jobs_do_not_share_a_directory(parts, tmp_path):
    with hold(tmp_path / "tokens", "data.tokens"), pytest.raises(RunError, match="in use by another run"):
        make(parts, tmp_path / "tokens")
    assert make(parts, tmp_path / "tokens") == 0


def test_a_half_made_cache_says_how_to_go_on(train, parts, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # the plan, three chunks of four syncs each, and the first of the next
        die_at(patch, 3 + 3 * 4 + 1, Killed())
        make(parts, tmp_path / "tokens")
    message = r"not finished: 3 of 6 chunks \(50%\) are made; to go on: fastbeit tokenize tiny.yaml"
    with pytest.raises(CacheError, match=message) as caught:
        train("run", data__tokens=tmp_path / "tokens")
    assert caught.value.exit_code == 78
    assert main(["tokenize", "--info", str(tmp_path / "tokens")]) == 78
    assert "3 of 6 chunks" in capsys.readouterr().err
    with pytest.raises(RunError, match="seed is 0 there, 1 here"):
        make(parts, tmp_path / "tokens", seed=1)
    (tmp_path / "tokens/.view-001.npy.part").unlink()
    with pytest.raises(CacheError, match=r"view-001.npy.part' cannot be read: No such file.*delete the directory"):
        make(parts, tmp_path / "tokens")


@pytest.mark.parametrize("flip", ["another chunk", "a token", "no UTF-8"])
def test_what_was_damaged_meanwhile_is_made_again(parts, tokens, tmp_path, monkeypatch, flip):
    folder = tmp_path / "tokens"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 2 + 3 * 4 + 1, Killed())
        make(parts, folder)
    journal, part = folder / "done-000.jsonl", folder / ".view-001.npy.part"
    if flip == "another chunk":
        # else its tokens would stay 0
        journal.write_text(journal.read_text().replace('"chunk": 1', '"chunk": 5'))
    elif flip == "no UTF-8":
        journal.write_bytes(journal.read_bytes().replace(b'"chunk": 1', b'"chunk\xff: 1'))
    else:
        edit(part, 128, bytes([part.read_bytes()[128] ^ 1]))
    assert make(parts, folder) == 0 and files(folder) == files(tokens)


# ---- as its user runs it


@pytest.fixture(scope="module")
def many(parts, tmp_path_factory) -> dict[str, str]:
    """More images, for jobs that are stopped in the middle."""
    folder = tmp_path_factory.mktemp("many")
    twelve = make_photos(folder / "photos")
    for i in range(NUM_IMAGES, 240):
        os.link(twelve / f"{i % NUM_IMAGES:02}.jpg", twelve / f"{i}.jpg")
    build_index(twelve, folder / "images.idx", progress=False)
    (twelve / "03.jpg").unlink()
    return {**parts, "data.index": str(folder / "images.idx")}


@pytest.fixture(scope="module")
def many_tokens(many, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "tokens"
    assert make(many, folder) == 0
    return folder


# chunks of six crops, each with three syncs: on no machine are 120 of them over before a signal comes
SMALL = f"""
import os, sys, time, fastbeit.cli, fastbeit.tokenizer.cache.writer as writer
writer.CHUNK_CROPS, fsync = {CHUNK_CROPS}, os.fsync
os.fsync = lambda file: (time.sleep(0.01), fsync(file))
sys.exit(fastbeit.cli.main())
"""


@contextlib.contextmanager
def job_of(many, folder: Path, *launcher: str) -> Iterator[subprocess.Popen]:
    """The command, with small chunks, in a process group of its own."""
    script = folder.with_name("small.py")
    script.write_text(SMALL)
    settings = [f"{key}={value}" for key, value in many.items() if key != "config"]
    with subprocess.Popen(
        [*(launcher or [sys.executable]), script, "tokenize", many["config"], *settings]
        + [f"data.num_crops={VIEWS}", f"data.tokens={folder}"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        yield job


def num_lines(folder: Path, ranks: str = "*") -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"done-{ranks}.jsonl"))


def assert_none_made_twice(folder: Path) -> None:
    lines = [line for path in folder.glob("done-*.jsonl") for line in path.read_text().splitlines()]
    chunks = [json.loads(line)["chunk"] for line in lines if line.endswith("}")]
    assert len(chunks) == len(set(chunks)) > 0


def test_kill_9_five_times(many, many_tokens, tmp_path):
    folder, moments = tmp_path / "tokens", random.Random(0)
    for _ in range(5):
        before = num_lines(folder)
        with job_of(many, folder) as job:
            wait_until(job, lambda before=before: num_lines(folder) > before)
            time.sleep(moments.uniform(0, 0.1))
            os.killpg(job.pid, signal.SIGKILL)
        assert job.returncode == -signal.SIGKILL and not (folder / "tokens.json").exists()
        # what a power cut can leave of a line
        with (folder / "done-000.jsonl").open("a") as journal:
            journal.write('{"chunk": 119, "b')
    assert_none_made_twice(folder)
    assert make(many, folder) == 0
    assert files(folder) == files(many_tokens)


def test_a_signal_stops_and_says_how_to_go_on(many, many_tokens, tmp_path):
    folder = tmp_path / "tokens"
    with job_of({**many, "data.num_workers": 1}, folder) as job:
        wait_until(job, lambda: num_lines(folder) > 2)
        os.killpg(job.pid, signal.SIGTERM)
        _, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 75, stderr
    assert "stopped, saved:" in stderr and f"to go on: fastbeit tokenize {many['config']}" in stderr
    assert 2 < num_lines(folder) < 120
    assert make(many, folder) == 0
    assert files(folder) == files(many_tokens)


def test_a_stop_does_not_wait_for_the_end_of_a_chunk(parts, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("fastbeit.tokenizer.cache.writer.CHUNK_CROPS", 1000)
        patch.setattr("fastbeit.jobs.tokenize.ENCODED_TOGETHER", 6)
        # the first progress that is said is that of two images
        patch.setattr("fastbeit.jobs.tokenize.Progress.advance", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert make(parts, tmp_path / "tokens") == 75
    assert "stopped, saved: 0 of 1 chunks (0%) are made" in capsys.readouterr().err
    with pytest.raises(CacheError, match="begun by another version"):
        make(parts, tmp_path / "tokens")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cache_says_in_what_precision_it_was_made(train, parts, tokens, tmp_path, precision, capfd):
    """Its tokens are those that a run of this precision makes; where it goes on it must be the same."""
    reduced = {"tokenizer.precision": precision, "optim.steps": 3}
    made = train("fly", **reduced)
    make(parts, tmp_path / "tokens", **reduced)
    assert open_cache(tmp_path / "tokens").card.precision == precision
    assert facts(train("cached", data__tokens=tmp_path / "tokens", **reduced)) == facts(made)
    assert f"tokenizer: {precision}" in capfd.readouterr().err
    with pytest.raises(RunError, match=f"tokenizer.precision is {precision} there, fp32 here"):
        make(parts, tmp_path / "tokens")


def test_ranks_may_come_and_go(many, many_tokens, tmp_path, monkeypatch):
    """Two, stopped; one, killed; two to the end."""
    folder, torchrun = tmp_path / "tokens", ("torchrun", "--standalone", "--nproc-per-node", "2")
    with job_of(many, folder, *torchrun) as job:
        wait_until(job, lambda: num_lines(folder, "000") and num_lines(folder, "001"))
        os.killpg(job.pid, signal.SIGTERM)
        _, stderr = job.communicate(timeout=PATIENCE_S)
    before = num_lines(folder)
    assert "stopped, saved:" in stderr and 2 <= before < 100, stderr
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, 10, Killed())
        make(many, folder)
    assert num_lines(folder) > before
    assert_none_made_twice(folder)
    with job_of(many, folder, *torchrun) as job:
        _, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stderr
    assert files(folder) == files(many_tokens)
