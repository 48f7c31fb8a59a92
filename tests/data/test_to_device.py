import pytest
import torch

from fastbeit.data import to_device as handover
from fastbeit.data.batch import Batch
from fastbeit.data.to_device import Copier, on_device, one_ahead


def batch(i, token_images=True):
    images = torch.full((2, 4, 4, 3), i, dtype=torch.uint8)
    return Batch(images, images + 1 if token_images else None, torch.tensor([i, i]), torch.tensor([0, 0]))


class Source:
    """Batches, and what was done with them; `error` comes in place of the last."""

    def __init__(self, number, error=None):
        self.number, self.error, self.events = number, error, []

    def batches(self):
        try:
            for i in range(self.number):
                self.events.append(f"made {i}")
                yield batch(i)
            if self.error:
                raise self.error
        finally:
            self.events.append("closed")


class FakeCopier:
    """Stands in for the CUDA streams: says when copies begin and end."""

    events: list[str]

    def __init__(self, device):
        assert device == torch.device("cuda")

    def begin(self, batch):
        self.events.append(f"copy {batch.sample[0]}")
        return batch, None

    def end(self, begun):
        self.events.append(f"copied {begun[0].sample[0]}")
        return begun[0]


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    monkeypatch.setattr(handover, "Copier", FakeCopier)
    return torch.device(request.param)


def test_batches_pass_unchanged_and_in_order(device):
    source = Source(3)
    FakeCopier.events = source.events
    for i, found in enumerate(on_device(source.batches(), device)):
        assert found.images.unique().tolist() == [i]
        assert found.token_images is not None and found.token_images.unique().tolist() == [i + 1]
        assert found.sample.tolist() == [i, i] and found.epoch.tolist() == [0, 0]
        source.events.append(f"used {i}")
    if device.type == "cpu":
        assert source.events == ["made 0", "used 0", "made 1", "used 1", "made 2", "used 2", "closed"]
        return
    # a copy begins before the batch before it is used, and one alone
    assert source.events == (
        "made 0,copy 0,made 1,copy 1,copied 0,used 0,made 2,copy 2,copied 1,used 1,closed,copied 2,used 2".split(",")
    )


def test_errors_come_after_the_batches_before_them(device):
    source = Source(2, ValueError("disk"))
    FakeCopier.events = []
    moved, seen = on_device(source.batches(), device), []
    with pytest.raises(ValueError, match="disk"):
        for found in moved:
            seen.append(int(found.sample[0]))
    assert seen == [0, 1] and source.events[-1] == "closed"


def test_closing_closes_the_source(device):
    source = Source(5)
    FakeCopier.events = []
    batches = source.batches()  # held: else it is closed because nobody has it any more
    moved = on_device(batches, device)
    next(moved)
    moved.close()
    assert source.events[-1] == "closed" and "made 3" not in source.events


@pytest.mark.parametrize("number", [0, 1, 4])
def test_one_ahead(number):
    taken = []
    items = (taken.append(i) or i for i in range(number))
    for i in one_ahead(items):
        assert taken == list(range(min(i + 2, number)))
    assert taken == list(range(number))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a CUDA device")
@pytest.mark.parametrize("token_images", [True, False])
def test_copies_on_a_stream_of_their_own(token_images):
    cuda = torch.device("cuda")
    copier, source = Copier(cuda), batch(7, token_images)
    moved = copier.end(copier.begin(source))
    assert moved.images.is_cuda and torch.equal(moved.images.cpu(), source.images)
    assert moved.sample is source.sample and (moved.token_images is not None) == token_images
    # what lies there already is not copied
    assert copier.end(copier.begin(moved)).images is moved.images
