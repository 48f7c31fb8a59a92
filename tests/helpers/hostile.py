"""Files made to do harm, or damaged, and how they are refused."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest

from fastbeit.errors import CHECKPOINT_UNUSABLE, TokenizerError
from fastbeit.weights.tokenizers import read_released
from fastbeit.weights.torchfile import MAGIC, VERSION

TEN_GB = 10 << 30


def refused(path: Path, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as err:
        read_released(path)
    assert str(err.value).startswith(f"'{path}' ") and "\n" not in str(err.value)
    assert err.value.exit_code == CHECKPOINT_UNUSABLE


def text(value: str) -> bytes:
    """Push it."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(name: str, *args: bytes) -> bytes:
    """Push what a function of one or two arguments gives."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + b"".join(args) + (b"\x85", b"\x86")[len(args) - 1] + b"R"


def wrapped(body: bytes, container: str) -> bytes:
    """A file whose pickle has this body."""
    program = b"\x80\x02" + body + b"."
    if container == "plain":
        return program
    if container == "legacy":
        info = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {}}
        return b"".join(pickle.dumps(value, 2) for value in (MAGIC, VERSION, info)) + program + pickle.dumps([], 2)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    return file.getvalue()
