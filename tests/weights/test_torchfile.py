"""Files of torch, zip and legacy: what they hold is where they say, or they are refused."""

import copy
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from fastbeit.config.tokenizer import Architecture
from fastbeit.tokenizer.dvae import Encoder
from fastbeit.weights.torchfile import MAGIC, VERSION
from helpers.dalle import FORMATS, TINY, official, save
from helpers.hostile import TEN_GB, refused, wrapped


class Persistent(tuple):
    """Written as a persistent id."""


class Rebuilt:
    """Written as a tensor of these arguments."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return _rebuild_tensor_v2, self.args


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Persistent) else None


def crafted(path: Path, *args, storage: tuple, container: str = "zip", values: bytes = bytes(16), header: int = 4):
    """A file of one tensor, of whose storage the pickle says one thing and the file may have another."""
    body = io.BytesIO()
    Pickler(body, 2).dump({"blocks.input.w": Rebuilt(Persistent(storage), *args, False, OrderedDict())})
    content = wrapped(body.getvalue()[2:-1], container)
    if container == "legacy":
        keys = pickle.dumps(["0"], 2)
        path.write_bytes(content[: -len(pickle.dumps([], 2))] + keys + struct.pack("<q", header) + values)
        return
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", values)


STORAGE = ("storage", torch.FloatStorage, "0", "cpu", 4)
OUTSIDE = "a tensor within the 4 values of its storage"
TENSORS = {
    "good": (STORAGE, (0, (1, 1, 2, 2), (4, 4, 2, 1)), "wants blocks.output.conv.w with 4"),
    "too long": (STORAGE, (0, (5,), (1,)), OUTSIDE),
    "offset": (STORAGE, (1, (4,), (1,)), OUTSIDE),
    "10 GB": (STORAGE, (0, (TEN_GB // 4,), (1,)), OUTSIDE),
    "of one value": (STORAGE, (0, (TEN_GB,), (0,)), OUTSIDE),
    "stride": (STORAGE, (0, (2, 2), (10, 1)), OUTSIDE),
    "huge stride": (STORAGE, (0, (2,), (1 << 62,)), OUTSIDE),
    "negative offset": (STORAGE, (-1, (4,), (1,)), "sizes from 1 up"),
    "negative stride": (STORAGE, (3, (4,), (-1,)), "sizes from 1 up"),
    "negative size": (STORAGE, (0, (-4,), (1,)), "sizes from 1 up"),
    "no values": (STORAGE, (0, (0, 1 << 62), (1, 1)), "sizes from 1 up"),
    "dimensions": (STORAGE, (0, (1,) * 999, (1,) * 999), "at most 8 sizes from 1 up, found 999"),
    "fewer strides": (STORAGE, (0, (2, 2), (1,)), "storage, offset, shape and stride"),
    "a text": (STORAGE, ("0", (4,), (1,)), "storage, offset, shape and stride"),
    "fraction": (STORAGE, (0, (4.0,), (1,)), "sizes from 1 up"),
    "another kind": (("file", "/etc/passwd"), (0, (4,), (1,)), "neither a module nor a storage: file: refused"),
    "no kind": ((), (0, (4,), (1,)), "neither a module nor a storage: nothing"),
    "no storage": (("module", torch.FloatStorage, "", ""), (0, (4,), (1,)), "storage, offset, shape and stride"),
    "another class": (("storage", OrderedDict, "0", "cpu", 4), (0, (4,), (1,)), "nor a storage: storage"),
    "a path": (("storage", torch.FloatStorage, "../../x", "cpu", 4), (0, (4,), (1,)), "has no data/../../x|cut short"),
    "negative storage": (("storage", torch.FloatStorage, "0", "cpu", -4), (0, (4,), (1,)), "nor a storage"),
    "large storage": (("storage", torch.FloatStorage, "0", "cpu", TEN_GB), (0, (4,), (1,)), "wants 10737418240 values"),
    "view": ((*STORAGE, ("1", 0, 2)), (0, (4,), (1,)), "shares storages"),
    "complex": (("storage", torch.ComplexFloatStorage, "0", "cpu", 4), (0, (4,), (1,)), "torch.ComplexFloatStorage"),
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("storage, args, message", TENSORS.values(), ids=list(TENSORS))
def test_a_tensor_stays_inside_of_its_storage(tmp_path, container, storage, args, message):
    crafted(tmp_path / "x.pkl", *args, storage=storage, container=container)
    refused(tmp_path / "x.pkl", message)


@pytest.mark.parametrize("num_values, found", [(4, 8), (4, 12), (TEN_GB, 16), (-1, 16)])
def test_a_storage_in_the_legacy_format_is_all_there(tmp_path, num_values, found):
    values = {"storage": STORAGE, "container": "legacy", "values": bytes(found), "header": num_values}
    crafted(tmp_path / "x.pkl", 0, (4,), (1,), **values)
    refused(tmp_path / "x.pkl", f"wants 4 values of torch.float32, and says {num_values}; {found} bytes are left")


def test_a_storage_in_the_legacy_format_is_there_at_all(tmp_path):
    file = tmp_path / "x.pkl"
    crafted(file, 0, (4,), (1,), storage=STORAGE, container="legacy")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    refused(file, "is cut short, or holds values that nothing refers to")
    keys = len(pickle.dumps(["0"], 2)) + 8 + 16
    file.write_bytes(whole[:-keys] + pickle.dumps([], 2))
    refused(file, "values of its tensors are missing")
    file.write_bytes(whole[:-keys] + pickle.dumps([0], 2) + bytes(24))
    refused(file, "holds values that nothing refers to")


def test_tensors_that_share_values_do_not_add_up(tmp_path):
    """A small file is not read as gigabytes."""
    shared = torch.ones(2**21)  # 8 MB; group_4's blocks alone want 10 times as many values
    tensors = dict(Encoder(Architecture(n_hid=64, vocab_size=512)).state_dict())
    for key, value in tensors.items():
        tensors[key] = shared[: value.numel()].view(value.shape)
    refused(save(tensors, tmp_path / "x.pth"), "bytes, and its tensors want more: refused")


def test_a_member_that_claims_a_huge_size(tmp_path):
    crafted(tmp_path / "x.pkl", 0, (4,), (1,), storage=STORAGE)
    content = bytearray((tmp_path / "x.pkl").read_bytes())
    entry = content.rindex(b"PK\1\2")  # of archive/data/0 in the zip's directory
    content[entry + 20 : entry + 28] = struct.pack("<II", 0xFFFF0000, 0xFFFF0000)
    (tmp_path / "x.pkl").write_bytes(content)
    refused(tmp_path / "x.pkl", "data/0 wants 4294901760: cut short")


def test_a_member_is_where_the_directory_says(tmp_path):
    file = tmp_path / "x.pkl"
    crafted(file, 0, (4,), (1,), storage=STORAGE)
    whole = file.read_bytes()
    place = whole.rindex(b"PK\3\4")
    file.write_bytes(whole[:place] + b"QK" + whole[place + 2 :])
    refused(file, "data/0 is not where the zip file says")
    # the directory itself is said to be farther on by the length of the file: members begin before the file does
    end = whole.index(b"PK\5\6") + 16
    (begin,) = struct.unpack_from("<I", whole, end)
    file.write_bytes(whole[:end] + struct.pack("<I", begin + len(whole)) + whole[end + 4 :])
    refused(file, "data.pkl is not where the zip file says|damaged zip file")


def test_a_value_that_changed_on_its_way(tmp_path):
    crafted(tmp_path / "x.pkl", 0, (4,), (1,), storage=STORAGE, values=b"sixteen bytes ..")
    content = (tmp_path / "x.pkl").read_bytes()
    (tmp_path / "x.pkl").write_bytes(content.replace(b"sixteen", b"Sixteen"))
    refused(tmp_path / "x.pkl", "is damaged: the checksum of data/0 is wrong")


def test_members_do_not_overlap(tmp_path):
    """The directory of a zip file may name the same bytes a million times."""
    file = save({"a": torch.ones(1 << 14), "b": torch.ones(1 << 14)}, tmp_path / "good.pth")
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name in ("data.pkl", "data/0"):
            archive.writestr(f"x/{name}", good.read(f"good/{name}"))
        twin = copy.copy(archive.getinfo("x/data/0"))
        twin.filename = "x/data/1"
        archive.filelist.append(twin)
    refused(tmp_path / "x.pth", "wants the same bytes for several storages")


def test_a_member_that_is_packed_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pkl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    refused(tmp_path / "x.pkl", "wants data.pkl to be unpacked: refused")


def test_a_zip_that_is_not_of_torch(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    refused(tmp_path / "x.npz", "is a zip file, but not of torch")


def test_a_zip_of_two_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pkl", "w") as archive:
        for name in ("a", "b"):
            archive.writestr(f"{name}/data.pkl", pickle.dumps({}, 2))
    refused(tmp_path / "x.pkl", "is a zip file, but not of torch: it wants one data.pkl")


def test_another_version(tmp_path):
    info = b"".join(pickle.dumps(value, 2) for value in (MAGIC, VERSION + 1, {"little_endian": True}))
    (tmp_path / "x.pkl").write_bytes(info + pickle.dumps({}, 2) + pickle.dumps([], 2))
    refused(tmp_path / "x.pkl", "wants to be of version 1001")


def test_another_byte_order(tmp_path):
    crafted(tmp_path / "x.pkl", 0, (4,), (1,), storage=STORAGE)
    with zipfile.ZipFile(tmp_path / "x.pkl", "a") as archive:
        archive.writestr("archive/byteorder", "big")
    refused(tmp_path / "x.pkl", "wants to be little-endian")
    info = b"".join(pickle.dumps(value, 2) for value in (MAGIC, VERSION, {"little_endian": False}))
    (tmp_path / "y.pkl").write_bytes(info + pickle.dumps({}, 2) + pickle.dumps([], 2))
    refused(tmp_path / "y.pkl", "little-endian, and is not")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_truncated_file(tmp_path, format, kept):
    file = save(official(TINY)[0], tmp_path / "x.pkl", format)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    refused(file, "is cut short|is a damaged zip file|is damaged or|cut short: storage")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "is a web page, not weights"),
        (b"\n  <html>", "is a web page"),
        (
            b"--2021-06-16 10:00:00--  https://cdn.openai.com/dall-e/encoder.pkl",
            "no file of torch.*opcode b'-' unknown",
        ),
        (b"Not Found", "wants the pickle opcode OBJ, which no weights need: refused"),
        (b"PK\3\4" + bytes(100), "is a damaged zip file"),
        (b"\x80", "damaged or no file of torch"),
        (b"\0" * 4096, "damaged or no file of torch"),
        (pickle.dumps({"a": 1}), "is a pickle, but no file of torch"),
        (pickle.dumps(MAGIC, 2), "is damaged or no file of torch"),
    ],
    ids=str,
)
def test_a_file_that_holds_no_weights(tmp_path, content, message):
    (tmp_path / "x.pkl").write_bytes(content)
    refused(tmp_path / "x.pkl", message)


def test_a_directory_and_a_file_that_is_not_there(tmp_path):
    refused(tmp_path, "cannot be read: Is a directory")
    refused(tmp_path / "x.pkl", "cannot be read: No such file")
