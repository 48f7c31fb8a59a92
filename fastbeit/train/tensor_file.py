"""safetensors files, one tensor at a time: neither who writes one nor who reads it has all of it in memory.

The layout is that of https://github.com/huggingface/safetensors: eight bytes with the length of the header, a JSON
header with dtype, shape and place of each tensor, and the tensors. The library's own writer wants all of them at once.
"""

import errno
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from fastbeit.engine.streamed import Tensors, in_order, read, take_part
from fastbeit.files import do_without

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # of the first tensor


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a file; other ranks `take_part` in what is streamed, all of which is read, also where writing fails.

    Raises:
        OSError: the disk is full or not writable.
    """
    header, end = {}, 0
    ordered = in_order(tensors)
    for name, tensor in ordered:
        start, end = end, end + tensor.dtype.itemsize * _numel(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    unread = ordered[::-1]
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            while unread:
                _, tensor = unread.pop()
                value = read(tensor).contiguous()
                assert value.shape == tuple(tensor.shape) and value.dtype == tensor.dtype
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
    except OSError:
        take_part(dict(unread))
        raise


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for.

    Raises:
        SafetensorError, OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._whole: dict[str, Tensor] = {}
        try:
            self._file = safe_open(path, "pt")
            self._names = list(self._file.keys())
        except OSError as err:
            # the library says the number in words alone
            if f"os error {errno.ENODEV}" not in str(err):
                raise
            do_without(
                path, "memory-mapped files", err, "checkpoints are read as a whole, which takes twice the memory"
            )
            self._whole = load(path.read_bytes())
            self._names = list(self._whole)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._whole[name] if self._whole else self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Renamed(Mapping[str, Tensor]):
    """Some tensors under other names.

    Args:
        names: of each, and its name in `tensors`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: dict[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
