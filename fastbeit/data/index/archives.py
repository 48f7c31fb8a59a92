"""The images in tar and zip archives: where they lie, and what else is in there and why it is not used.

Only lists are read here, and the labels; nothing is unpacked. A name says nothing about where a member may be written,
since none is written; those that point outside are refused all the same. Of a tar, members of one key make up a sample,
as in WebDataset: `dog/000.jpg`, `dog/000.cls`, `dog/000.json` (the key ends at the first dot of the last part).
"""

import io
import json
import os
import stat
import struct
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastbeit.data.index.members import DEFLATE, HIDDEN, MAX_BYTES, PLAIN, Member, Reason, Window

IMAGE_SUFFIXES = b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff", b".ppm", b".pgm", b".pbm", b".pnm"
CLASS, JSON = b"cls", b"json"
MAX_TEXT_BYTES = 1 << 20  # of a .json, or of a header of a tar
MAX_CLASSES = 1 << 20
TAR_BLOCK = 512

ZIP_END, ZIP64_LOCATOR, ZIP64_END = b"PK\5\6", b"PK\6\7", b"PK\6\6"
ZIP_ENTRY, ZIP_LOCAL = struct.Struct("<4s4xHH8xIIHHH4xII"), struct.Struct("<4s22xHH")
ZIP_METHODS = {0: PLAIN, 8: DEFLATE}
ZIP_ENCRYPTED, ZIP_UTF8 = 1 << 0, 1 << 11  # flags
ZIP64_EXTRA, ZIP64_WANTED = 1, 0xFFFFFFFF


class Entry(NamedTuple):
    """A regular file in an archive."""

    name: bytes
    offset: int
    size: int


def read_tar(path: Path) -> Iterator[Member | Reason]:
    """The images of a tar without compression, in its order, and what is wrong with the rest."""
    with path.open("rb", buffering=0) as file:
        for _, group in groupby(_tar_entries(file), _key):
            entries, labels = [], {}
            for entry in group:
                if not isinstance(entry, Entry):
                    yield entry
                elif _suffix(entry.name) in (CLASS, JSON):
                    try:
                        labels[_suffix(entry.name)] = _read_label(file, entry)
                    except ValueError as err:
                        yield os.fsdecode(entry.name), f"its label cannot be read: {err}"
                else:
                    entries.append(entry)
            label = labels.get(CLASS, labels.get(JSON))
            images = [entry for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)]
            # texts and arrays beside an image are part of its sample; where no name tells an image, the bytes will
            for entry in images or entries:
                yield Member(entry.name, entry.offset, entry.size, PLAIN, label)


def _key(entry: Entry | Reason) -> bytes | None:
    return key_of(entry.name) if isinstance(entry, Entry) else None


def key_of(name: bytes) -> bytes:
    """What the members of a sample have in common."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.split(b".")[0]


def _suffix(name: bytes) -> bytes:
    return name.rpartition(b"/")[2].partition(b".")[2].lower()


def _read_label(file: io.FileIO, entry: Entry) -> str | int | None:
    """`ValueError` when it is none."""
    if entry.size > MAX_TEXT_BYTES:
        raise ValueError(f"{entry.size} bytes of text")
    text = os.pread(file.fileno(), entry.size, entry.offset).decode().strip()
    if _suffix(entry.name) == JSON:
        try:
            found = json.loads(text)
        except RecursionError:
            raise ValueError("JSON inside JSON inside JSON") from None
        found = found.get("label", found.get("cls")) if isinstance(found, dict) else None
        return found if isinstance(found, str) else _number(found)
    return label_of(text)


def label_of(text: str) -> str | int | None:
    """The class that a text names: by its number, as most write it, or by its name."""
    return _number(int(text)) if text.removeprefix("-").isdecimal() else text or None


def _number(found: object) -> int | None:
    """A class's number; None below 0, as some write that there is none.

    Raises:
        ValueError: it is no whole number, or too large.
    """
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if found is None or isinstance(found, bool) or isinstance(found, int) and found < 0:
        return None
    if not isinstance(found, int):
        raise ValueError(f"{str(found)[:40]!r} is no class, wanted a whole number or a name")
    if found >= MAX_CLASSES:
        raise ValueError(f"class {found}, at most {MAX_CLASSES - 1} can be")
    return found


class _Headers(Window):
    """A tar, as `tarfile` reads it: only headers are read, so a request for a long read means that one is corrupt."""

    def read(self, size: int = -1, /) -> bytes:
        if size > MAX_TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def _tar_entries(file: io.FileIO) -> Iterator[Entry | Reason]:
    total, last, seen = os.fstat(file.fileno()).st_size, 0, set()
    if not total:
        yield "", "empty file"
        return
    window = _Headers(file.fileno(), 0, total)
    try:
        with tarfile.TarFile(fileobj=window, encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                # the module keeps all members that it has met
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                name = os.fsencode(info.name)
                if reason := _tar_reason(info, total) or ("duplicate key" if name in seen else None):
                    yield info.name, reason
                elif info.isfile():
                    seen.add(name)
                    yield Entry(name, info.offset_data, info.size)
                if tar.offset <= last:
                    # a negative size leads back, for ever
                    raise tarfile.ReadError(f"a header that leads back, to byte {tar.offset}")
                last = tar.offset
            if reason := _tar_end(window, tar.offset, total):
                yield "", reason
    except (tarfile.TarError, ValueError, OverflowError, UnicodeError) as err:
        yield "", f"no tar, or cut short: after byte {last}: {err}; the members before that are used"


def _tar_reason(info: tarfile.TarInfo, total: int) -> str | None:
    """Why a member is not used."""
    if info.isdir():
        return None
    if info.issym() or info.islnk():
        return f"a link: to '{info.linkname}'"
    if not info.isfile() or info.issparse():
        return "not a regular file"
    if info.name.rpartition("/")[2].startswith("."):
        return HIDDEN
    return _outside(info.name) or _too_long(info.size, info.offset_data, total)


def _outside(name: str) -> str | None:
    return "points outside the archive" if name.startswith("/") or ".." in name.split("/") else None


def _too_long(size: int, offset: int, total: int) -> str | None:
    if not size:
        return "empty file"
    if size > MAX_BYTES:
        return f"too large: {size} bytes, at most {MAX_BYTES}"
    return f"truncated: {size} bytes, of which the archive has {max(0, total - offset)}" * (offset + size > total)


def _tar_end(window: _Headers, offset: int, total: int) -> str | None:
    """What is wrong with where the list of members ends: two empty blocks should stand there."""
    window.seek(offset)
    block = window.read(TAR_BLOCK)
    if len(block) < TAR_BLOCK:
        return f"cut short: it has {total} bytes and no end mark; the members before that are used"
    if any(block):
        return f"damaged header: at byte {offset}; the members from there on are not used"
    while block := window.read(MAX_TEXT_BYTES):
        if any(block):
            return f"more data after the end mark: at byte {offset}; tars put together are not read, only the first"
    return None


def read_zip(path: Path) -> Iterator[Member | Reason]:
    """The images of a zip, in the order of its directory, and what is wrong with the rest."""
    with path.open("rb", buffering=0) as file:
        total, seen = os.fstat(file.fileno()).st_size, set()
        try:
            directory, num_bytes, shift = _zip_directory(file, total)
            with io.BufferedReader(Window(file.fileno(), directory, num_bytes), 1 << 20) as entries:
                while found := entries.read(ZIP_ENTRY.size):
                    member = _zip_member(file, entries, found, shift, total)
                    if isinstance(member, Member) and member.name in seen:
                        yield os.fsdecode(member.name), "duplicate key"
                    elif member:
                        yield member
                    if isinstance(member, Member):
                        seen.add(member.name)
        except (ValueError, struct.error) as err:
            yield "", f"no zip, or a damaged one: {err}"


def _zip_directory(file: io.FileIO, total: int) -> tuple[int, int, int]:
    """First byte and length of the central directory, and how many bytes stand before the archive."""
    # behind the end record stands a comment of at most 64 KiB
    start = max(0, total - (1 << 16) - 22)
    tail = os.pread(file.fileno(), total - start, start)
    end = tail.rfind(ZIP_END)
    if end < 0 or end + 22 > len(tail):
        raise ValueError("it has no directory at its end; it may be cut short")
    disk, first_disk, num_bytes, offset = struct.unpack_from("<HH4xII", tail, end + 4)
    end += start
    locator = os.pread(file.fileno(), 20, max(0, end - 20))
    if locator.startswith(ZIP64_LOCATOR):
        (end,) = struct.unpack_from("<Q", locator, 8)
        record = os.pread(file.fileno(), 56, end)
        if not record.startswith(ZIP64_END):
            raise ValueError("its ZIP64 directory is not where it says")
        disk, first_disk, num_bytes, offset = struct.unpack_from("<II16xQQ", record, 16)
    if disk or first_disk:
        raise ValueError("it is one part of several; put them together: zip -s 0 parts.zip --out whole.zip")
    shift = end - num_bytes - offset
    if shift < 0:
        raise ValueError("its directory does not fit in it")
    return offset + shift, num_bytes, shift


def _zip_member(file: io.FileIO, entries: BinaryIO, entry: bytes, shift: int, total: int) -> Member | Reason | None:
    """What an entry of the directory, and its name in `entries`, say; None for a folder."""
    magic, flags, method, num_packed, num_bytes, name_bytes, extra_bytes, comment_bytes, mode, offset = (
        ZIP_ENTRY.unpack(entry)
    )
    if magic != b"PK\1\2":
        raise ValueError("an entry of its directory is not where it should be; the members before that are used")
    raw, extra = entries.read(name_bytes), entries.read(extra_bytes)
    entries.read(comment_bytes)
    name = raw.decode("utf-8" if flags & ZIP_UTF8 else "cp437", "surrogateescape")
    num_bytes, num_packed, offset = _zip64(extra, [num_bytes, num_packed, offset])
    if name.endswith("/"):
        return None
    if name.rpartition("/")[2].startswith("."):
        return name, HIDDEN
    local = os.pread(file.fileno(), ZIP_LOCAL.size, offset + shift)
    if len(local) < ZIP_LOCAL.size or not local.startswith(b"PK\3\4"):
        return name, "corrupt: its place in the directory is wrong"
    # the extra field here and in the directory differ in length
    offset += shift + ZIP_LOCAL.size + sum(ZIP_LOCAL.unpack(local)[1:])
    if stat.S_ISLNK(mode >> 16):
        return name, "a link"
    if flags & ZIP_ENCRYPTED:
        return name, "encrypted"
    if method not in ZIP_METHODS:
        return name, f"compressed by method {method}; stored and deflated members are read (zip -0 or zip)"
    if reason := _outside(name) or _too_long(num_bytes, 0, num_bytes) or _too_long(num_packed, offset, total):
        return name, reason
    return Member(os.fsencode(name), offset, num_packed, ZIP_METHODS[method], None)


def _zip64(extra: bytes, numbers: list[int]) -> list[int]:
    """Numbers that are too large for their 32 bits stand in an extra field, in this order."""
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, place)
        if kind == ZIP64_EXTRA:
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, place + 4))
            return [next(wide, number) if number == ZIP64_WANTED else number for number in numbers]
        place += 4 + size
    return numbers
