"""Files that other people's `torch.save` wrote, read without running anything that they say.

Both formats are read, from one view of the file:

    zip       NAME/data.pkl; NAME/data/KEY holds the values of a storage, not compressed
    legacy    pickles of a magic number, a version, the byte order, the object and the keys of its storages; then, for
              each key, the number of values (int64) and the values

Each length in a file is checked against the file before anything of that size is made.
"""

import io
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fastbeit.weights.pickles import Machine, Malformed, Record, Storage, TensorSpec, shown, typed

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format
ZIP_MAGIC, LOCAL_HEADER = b"PK\3\4", 30
MAX_PARTS, MAX_DEPTH, MAX_NAME = 1 << 12, 8, 256


class TorchFile(NamedTuple):
    format: str
    value: Any  # of Records, dicts, TensorSpecs and plain values
    tensors: Callable[[dict[str, TensorSpec]], dict[str, Tensor]]  # reads values; on the CPU, owned by the caller


def open_torch(path: Path) -> TorchFile:
    """A file by its content, whatever it is called.

    Raises:
        Malformed: it is damaged, no file of torch, or names what it may not.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        # an empty file cannot be mapped
        if not path.stat().st_size:
            raise Malformed("is empty; download it again")
        # copy on write: torch warns of memory that it may not write to
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        name, value, places = _read_zip(file, view) if view[:4] == ZIP_MAGIC else _read_legacy(view)
    return TorchFile(name, value, lambda specs: _read_tensors(view, places, specs))


def named_tensors(value: Any) -> dict[str, TensorSpec]:
    """Parameters and buffers of a module, named as in its state dict; or of a state dict, which may be in a checkpoint.

    Raises:
        Malformed: it is neither, or goes too deep.
    """
    if isinstance(value, dict):
        wrapped = next((value[key] for key in ("state_dict", "weights") if isinstance(value.get(key), dict)), value)
        return {_key(key): _tensor_of(key, spec) for key, spec in wrapped.items()}
    if not isinstance(value, Record):
        raise Malformed(f"wants a module or a state dict, found {type(value).__name__}")
    tensors, modules, num_modules = {}, [("", value, 0)], 0
    while modules:
        prefix, module, depth = modules.pop()
        num_modules += 1
        if num_modules + len(tensors) > MAX_PARTS or depth > MAX_DEPTH:
            raise Malformed(
                f"wants more than {MAX_PARTS} modules and tensors, or modules deeper than {MAX_DEPTH}: refused"
            )
        for kind in ("_parameters", "_buffers"):
            for key, spec in typed(module.state.get(kind, {}), dict).items():
                if spec is not None:
                    tensors[prefix + _key(key)] = _tensor_of(key, spec)
        for key, child in typed(module.state.get("_modules", {}), dict).items():
            modules.append((f"{prefix}{_key(key)}.", typed(child, Record), depth + 1))
    return tensors


def _key(key: Any) -> str:
    if not isinstance(key, str) or len(key) > MAX_NAME:
        raise Malformed(f"wants names of at most {MAX_NAME} letters for its tensors, found {shown(key)}")
    return key


def _tensor_of(key: str, spec: Any) -> TensorSpec:
    if not isinstance(spec, TensorSpec):
        raise Malformed(f"wants a tensor under {shown(key)}, found {type(spec).__name__}: no weights of a tokenizer")
    return spec


Read = tuple[str, Any, dict[str, int]]  # format, value of the pickle, where the values of each storage begin


def _read_legacy(view: mmap.mmap) -> Read:
    if view[:64].lstrip()[:1] == b"<":
        raise Malformed("is a web page, not weights; download it again")
    if Machine().run(view) != MAGIC:
        raise Malformed("is a pickle, but no file of torch; it was not run")
    version, info, machine = Machine().run(view), Machine().run(view), Machine()
    if version != VERSION or not typed(info, dict).get("little_endian"):
        raise Malformed(
            f"wants to be of version {VERSION}, little-endian, and is not; save it again with a newer torch"
        )
    value = machine.run(view)
    keys, places, place = typed(Machine().run(view), list), {}, view.tell()
    for key in keys:
        storage = machine.storages.get(key) if isinstance(key, str) else None
        if storage is None or place + 8 > len(view):
            raise Malformed("is cut short, or holds values that nothing refers to; download it again")
        (num_values,) = struct.unpack_from("<q", view, place)
        places[key] = place + 8
        place = places[key] + storage.num_bytes
        if num_values != storage.num_values or place > len(view):
            raise Malformed(f"is damaged or cut short: {_values_of(storage, num_values, len(view) - places[key])}")
    if places.keys() != machine.storages.keys():
        raise Malformed("is damaged: values of its tensors are missing; download it again")
    return "legacy", value, places


def _values_of(storage: Storage, num_values: int, num_bytes: int) -> str:
    return (
        f"storage {shown(storage.key)} wants {storage.num_values} values of {storage.dtype}, and says {num_values}; "
        f"{num_bytes} bytes are left; download it again"
    )


def _read_zip(file: IO[bytes], view: mmap.mmap) -> Read:
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as err:
        raise Malformed(f"is a damaged zip file: {shown(str(err))}; download it again") from None
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Malformed("is a zip file, but not of torch: it wants one data.pkl; take the file as it was downloaded")
    root = pickles[0].removesuffix("data.pkl")

    def content(name: str) -> tuple[int, memoryview]:
        return _content(view, members.get(root + name), name)

    if root + "byteorder" in members and bytes(content("byteorder")[1]) != b"little":
        raise Malformed("wants to be little-endian, and is not; save it again on such a machine")
    machine, places, total = Machine(), {}, 0
    value = machine.run(io.BytesIO(content("data.pkl")[1]))
    for key, storage in machine.storages.items():
        places[key], values = content(f"data/{key}")
        total += len(values)
        if total > len(view):
            raise Malformed("wants the same bytes for several storages: refused")
        if len(values) != storage.num_bytes:
            raise Malformed(f"is damaged: {_values_of(storage, len(values) // storage.dtype.itemsize, len(values))}")
    return "zip", value, places


def _content(view: mmap.mmap, member: zipfile.ZipInfo | None, name: str) -> tuple[int, memoryview]:
    """Where a member begins, and its bytes; none are copied."""
    if member is None:
        raise Malformed(f"has no {shown(name)}; download it again")
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise Malformed(f"wants {shown(name)} to be unpacked: refused, since torch compresses nothing")
    header = view[member.header_offset : member.header_offset + LOCAL_HEADER]
    if member.header_offset < 0 or len(header) < LOCAL_HEADER or header[:4] != ZIP_MAGIC:
        raise Malformed(f"is damaged: {shown(name)} is not where the zip file says; download it again")
    start = member.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30]))
    if start + member.file_size > len(view):
        raise Malformed(
            f"has {len(view)} bytes, and {shown(name)} wants {member.file_size}: cut short; download it again"
        )
    content = memoryview(view)[start : start + member.file_size]
    if zlib.crc32(content) != member.CRC:
        raise Malformed(f"is damaged: the checksum of {shown(name)} is wrong; download it again")
    return start, content


def _read_tensors(view: mmap.mmap, places: dict[str, int], specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    # tensors that share values would be larger than their file
    if sum(spec.num_bytes for spec in specs.values()) > len(view):
        raise Malformed(f"has {len(view)} bytes, and its tensors want more: refused")
    return {name: _read_tensor(view, places[spec.storage.key], spec) for name, spec in specs.items()}


def _read_tensor(view: mmap.mmap, place: int, spec: TensorSpec) -> Tensor:
    dtype = spec.storage.dtype
    # bytes first: the values need not stand where their dtype may
    values = torch.frombuffer(
        view, dtype=torch.uint8, count=spec.num_bytes, offset=place + spec.offset * dtype.itemsize
    )
    return values.clone().view(dtype).as_strided(spec.shape, spec.stride).contiguous()
