"""What the loop does beside a step: it waits no longer than it must, and shares a step out."""

import signal
import threading

import pytest
import torch

from fastbeit.data.decode import decode_reference
from fastbeit.engine.ranks import World
from fastbeit.errors import DataError, RunError
from fastbeit.train.bad_samples import BadSamples
from fastbeit.train.feed import Feed
from fastbeit.train.loop import micro_batches
from fastbeit.train.meter import Meter
from fastbeit.train.stop import Stop
from helpers.photos import encoded, small_photo
from helpers.waiting import PATIENCE_S

WORLD = World(0, 1, torch.device("cpu"))


def feed_of(batches, stop: Stop, folder) -> Feed:
    bad_samples = BadSamples(folder / "bad_samples.jsonl", 10, writes=True)
    return Feed(batches, WORLD, stop, bad_samples, Meter(WORLD, 4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_ends_the_wait_for_a_disk_that_does_not_answer(tmp_path, number):
    def batches():
        signal.raise_signal(number)
        assert not threading.Event().wait(PATIENCE_S), "waited on"
        yield

    with Stop() as stop:
        assert feed_of(batches(), stop, tmp_path).next() is None
        assert stop.wanted


def test_a_terminal_that_is_closed_is_no_stop_for_who_said_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.wanted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_items_come_until_a_stop_is_wanted():
    def items():
        for number in range(9):
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
            yield number

    with Stop() as stop:
        assert [*stop.until_wanted(items())] == [0, 1]
    assert [*Stop().until_wanted([7, 8])] == [7, 8]


def test_a_stop_while_an_image_is_decoded_is_no_damaged_image(tmp_path, monkeypatch):
    """Decoders take any error for damage; a stop must not mark the image that was being decoded."""

    def decode(*args):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("decoded on")

    monkeypatch.setattr("fastbeit.data.decode.to_rgb", decode)

    def batches():
        yield decode_reference(encoded(small_photo(), "PNG"), (96, 128))

    with Stop() as stop:
        feed = feed_of(batches(), stop, tmp_path)
        assert feed.next() is None and stop.wanted
    assert not (tmp_path / "bad_samples.jsonl").exists()


def test_a_stop_that_came_before_asks_for_no_batch(tmp_path):
    def batches():
        raise AssertionError("a batch was asked for")
        yield

    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert feed_of(batches(), stop, tmp_path).next() is None


def test_a_save_is_told_with_the_batch_and_data_that_is_gone_is_raised(tmp_path):
    class Good:
        bad = ()

    def batches():
        signal.raise_signal(signal.SIGUSR1)
        yield Good()
        raise DataError("the disk is gone")

    with Stop() as stop:
        feed = feed_of(batches(), stop, tmp_path)
        assert isinstance(feed.next(), Good) and feed.save_wanted
        with pytest.raises(RunError, match="the disk is gone"):
            feed.next()


def test_what_keeps_a_rank_from_going_on_is_raised_before_a_batch_is_asked_for(tmp_path):
    def batches():
        raise AssertionError("a batch was asked for")
        yield

    with pytest.raises(RunError, match="the disk is full") as caught:
        feed_of(batches(), Stop(), tmp_path).next(RunError("the disk is full", 74))
    assert caught.value.exit_code == 74


@pytest.mark.parametrize("accumulate, sizes", [(1, [6]), (3, [2, 2, 2]), (4, [2, 2, 2]), (6, [1] * 6)])
def test_micro_batches_are_all_of_a_step(accumulate, sizes):
    tensors = torch.arange(6), torch.arange(12).view(6, 2)
    parts, lasts = zip(*micro_batches(tensors, accumulate), strict=True)
    assert [len(part[0]) for part in parts] == sizes
    assert lasts == (*[False] * (len(sizes) - 1), True)
    for together, one in zip(zip(*parts, strict=True), tensors, strict=True):
        assert torch.equal(torch.cat(together), one)
