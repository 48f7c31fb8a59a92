"""Files of tensors, against the library that defines them."""

import json
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastbeit.config.pretrain import Config
from fastbeit.config.read import configure
from fastbeit.engine.ranks import World
from fastbeit.engine.streamed import Streamed, in_order, take_part
from fastbeit.errors import RunError
from fastbeit.train.checkpoint import Saver, save_checkpoint
from fastbeit.train.ema import Average
from fastbeit.train.tensor_file import NAMES, Renamed, TensorFile, write_tensors
from helpers.ranks_in_threads import of_each_rank

DTYPES = [*NAMES]


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    found = {str(dtype): (100 * torch.randn(3, 5, generator=random)).to(dtype) for dtype in DTYPES}
    strided = torch.arange(24.0).view(2, 3, 4).transpose(0, 2)
    return found | {"scalar": torch.tensor(7.5), "empty": torch.zeros(0, 3), "strided": strided, 'ä/"': torch.ones(1)}


def test_the_library_reads_what_is_written(tmp_path):
    write_tensors(tmp_path / "file", tensors())
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_what_the_library_writes_is_read(tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in tensors().items()}, tmp_path / "file")
    found = TensorFile(tmp_path / "file")
    assert found.keys() == tensors().keys() and len(found) == len(tensors())
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor), name
    with pytest.raises(KeyError, match="nothing"):
        found["nothing"]


def test_each_tensor_is_aligned(tmp_path):
    write_tensors(tmp_path / "file", tensors())
    content = (tmp_path / "file").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    for name, told in json.loads(content[8 : 8 + length]).items():
        assert told["data_offsets"][0] % tensors()[name].dtype.itemsize == 0, name


def test_streamed_tensors_are_read_once_and_in_the_order_of_all_ranks(tmp_path):
    asked = []

    def streamed(name: str, tensor: torch.Tensor) -> Streamed:
        return Streamed(tuple(tensor.shape), tensor.dtype, lambda: asked.append(name) or tensor)

    half = {name: streamed(name, tensor) for name, tensor in tensors().items() if "int" in name}
    write_tensors(tmp_path / "file", tensors() | half)
    wanted = [name for name, _ in in_order(half)]
    assert asked == wanted and torch.equal(load_file(tmp_path / "file")["torch.int8"], tensors()["torch.int8"])
    # the other ranks know the same names in another order
    take_part(dict(reversed((tensors() | half).items())))
    assert asked == 2 * wanted


def test_a_tensor_that_is_not_what_was_announced_is_not_written(tmp_path):
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "file", {"a": Streamed((2,), torch.float32, lambda: torch.zeros(3))})


def test_a_file_that_is_no_such_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"nothing of the kind, but long enough")
    with pytest.raises(SafetensorError):
        TensorFile(tmp_path / "file")


def test_names_are_changed(tmp_path):
    save_file({"average.a": torch.ones(2), "a": torch.zeros(2)}, tmp_path / "file")
    found = Renamed(TensorFile(tmp_path / "file"), {"a": "average.a"})
    assert dict(found).keys() == {"a"} and found["a"].sum() == 2 and len(found) == 1


def test_all_is_read_where_the_disk_fails(tmp_path):
    """Each read is a collective: a rank that stopped would leave the others waiting for it."""
    asked = []

    def streamed(name: str) -> Streamed:
        return Streamed((3,), torch.float32, lambda: asked.append(name) or torch.zeros(3))

    def names(*prefixes: str) -> dict[str, Streamed]:
        return {name: streamed(name) for prefix in prefixes for name in (f"{prefix}1", f"{prefix}2")}

    with pytest.raises(OSError):
        write_tensors(tmp_path / "nowhere/file", names("a"))
    assert asked == ["a1", "a2"]
    asked.clear()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"):
        save_checkpoint(tmp_path / "file", 1, names("m"), names("o"), {})
    assert asked == ["m1", "m2", "o1", "o2"]


def test_a_full_disk_is_told_to_all_ranks(tmp_path):
    """Rank 0 alone writes; the others would go on, or wait for it."""
    (tmp_path / "checkpoints").write_text("in the way")
    config = configure(Config, [])

    def save(world: World) -> str:
        saver = Saver.__new__(Saver)
        vars(saver).update(world=world, folder=tmp_path / "checkpoints", origin={}, config=config)
        model = nn.Linear(2, 2)
        engine = SimpleNamespace(optimizer_state=dict)
        with pytest.raises(RunError, match="checkpoint of step 3 cannot be written") as caught:
            saver.save(3, engine, model, Average(model, None), {})  # pyright: ignore[reportArgumentType]
        return str(caught.value.exit_code)

    assert of_each_rank(3, save) == ["74"] * 3
