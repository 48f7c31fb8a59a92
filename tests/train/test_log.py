"""The log outlives a kill and a full disk, and TensorBoard is an extra."""

import json
import threading

import pytest
import torch

from fastbeit.errors import RunError
from fastbeit.train.bad_samples import BadSamples
from fastbeit.train.log import RunLog


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_past_the_checkpoint_and_unreadable_ones_go(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(tmp_path, 0, 9) as log:
        for step in 1, 2, 3, 4:
            log.write({"step": step, "event": "look"})
    text = path.read_bytes()
    path.write_bytes(text[: len(text) // 4] + b"\0\0\n[2]\n\xff\n" + text[len(text) // 4 :] + b'{"step": 5, "lo')
    with RunLog(tmp_path, 3, 9) as log:
        assert log.problem == f"line 2 and 3 more of '{path}' cannot be read: passed over"
        assert not log.lacks(3, "look") and log.lacks(4, "look")
        log.write({"step": 4, "event": "look"})
    assert lines(path) == [{"step": step, "event": "look"} for step in (1, 2, 3, 4)]
    with RunLog(tmp_path, 0, 9) as log:
        assert not log.problem
    assert lines(path) == []


def test_a_log_that_is_whole_is_not_written_again(tmp_path):
    with RunLog(tmp_path, 0, 9) as log:
        log.write({"step": 1})
    before = (tmp_path / "log.jsonl").stat().st_ino
    with RunLog(tmp_path, 1, 9):
        pass
    assert (tmp_path / "log.jsonl").stat().st_ino == before
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write("torn")
    with RunLog(tmp_path, 1, 9):
        pass
    assert lines(tmp_path / "log.jsonl") == [{"step": 1}]


def test_a_full_disk_is_kept_for_the_loop(tmp_path):
    bad_samples = BadSamples(tmp_path / "bad_samples.jsonl", 10)
    with RunLog(tmp_path, 1, 9) as log:
        for name in "log.jsonl", "bad_samples.jsonl":
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to("/dev/full")
        bad_samples.add([(1, "empty"), (2, "empty")])
        log.write({"step": 2})
        log.write({"step": 3})
    for error, name in (log.error, "log.jsonl"), (bad_samples.error, "bad_samples.jsonl"):
        assert error and error.exit_code == 74 and f"{name}' cannot be written: No space left" in str(error)
    assert len(bad_samples) == 2


def test_a_list_of_bad_images_with_unreadable_lines_is_taken_up(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_bytes(b'{"sample": 3}\n\0\0\n[]\n{"sample": "x"}\n{"sample": true}\n{"sample": 4, "rea')
    assert len(BadSamples(path, 10, writes=False)) == 1
    bad_samples = BadSamples(path, 10)
    assert bad_samples.problem.startswith("line 2 and 2 more")
    bad_samples.add([(4, "empty")])
    assert path.read_bytes().endswith(b'"rea\n{"sample": 4, "reason": "empty"}\n')
    assert len(BadSamples(path, 10, anew=True)) == 0 and not path.exists()


def test_a_log_that_cannot_be_begun_ends_the_run(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(RunError, match="log.jsonl' cannot be written") as caught:
        RunLog(tmp_path, 1, 9)
    assert caught.value.exit_code == 74


@pytest.mark.parametrize("breaks", ["at the start", "in its thread", "while closing"])
def test_tensorboard_never_ends_a_run_and_is_said_once(tmp_path, monkeypatch, capsys, breaks):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(*args):
        raise OSError(28, "No space left on device")

    hook = threading.excepthook
    if breaks == "at the start":
        (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with RunLog(tmp_path, 0, 9) as log:
        log.write({"step": 1, "loss": 1.0})
        if breaks != "at the start":
            monkeypatch.setattr(RecordWriter, "write" if breaks == "in its thread" else "flush", refuse)
        for step in 2, 3, 4:
            log.write({"step": step, "loss": 1.0})
            log.picture("a picture", torch.zeros(4, 4, 3, dtype=torch.uint8), step)
    said = capsys.readouterr().err
    assert said.count("no TensorBoard from here on") == 1 and "Traceback" not in said
    assert len(lines(tmp_path / "log.jsonl")) == 4 and log.error is None
    assert threading.excepthook == hook
