"""Images that lie inside other files: in tar and zip archives, and in tables."""

import io
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from fastbeit.data.decode import MAX_PIXELS
from fastbeit.errors import BadImage

# how the bytes of an image are kept
PLAIN = 0  # as they are
DEFLATE = 1  # as a raw deflate stream, in a zip
TABLE = 2  # in a row of a Parquet file

AROUND_BYTES = 64 << 20  # that may stand around the pixels: profiles, previews, what a camera appends
SAMPLE_BYTES = 2048
CHUNK_BYTES = 1 << 16

HIDDEN = "hidden: its name begins with a dot"  # a reason to pass over a file
Reason = tuple[str, str]  # the name of what is not used, "" for the whole file, and why


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a file of several, or what says that it is one: nobody has looked at its bytes yet."""

    name: bytes
    offset: int  # in bytes; of a TABLE: the row
    size: int  # in bytes, as they stand in the file; of a TABLE: of the image
    packed: int
    label: str | int | None  # name of the class, or its number


def most_bytes(height: int, width: int) -> int:
    """Of an image file: 16-bit RGBA without compression, and what may stand around it."""
    return 8 * height * width + AROUND_BYTES


MAX_BYTES = most_bytes(1, MAX_PIXELS)


def content_sample(read: Callable[[int, int], bytes], num_bytes: int) -> int:
    """CRC-32 of 2 KiB each at the beginning, in the middle and at the end of an image's bytes as they are kept.

    Cheap enough to be compared whenever an image is read: another photo of the same length is told from the old one.

    Args:
        read: the bytes from a place on, so many.
    """
    last = max(0, num_bytes - SAMPLE_BYTES)
    places = range(0, num_bytes, SAMPLE_BYTES) if num_bytes <= 3 * SAMPLE_BYTES else (0, last // 2, last)
    checksum = 0
    for place in places:
        checksum = zlib.crc32(read(place, SAMPLE_BYTES), checksum)
    return checksum


def inflate(data: bytes, most: int) -> bytes:
    """What a raw deflate stream holds; `BadImage` when it is damaged, or longer than `most` bytes."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, most + 1)
    except zlib.error as err:
        raise BadImage(f"corrupt deflate stream: {err}") from None
    if len(inflated) > most:
        raise BadImage(f"too large: over {most} bytes when inflated")
    if not stream.eof:
        raise BadImage("corrupt deflate stream: cut short")
    return inflated


class Window(io.RawIOBase):
    """`size` bytes of an open file from `offset` on, as a file; many threads may have windows of one descriptor."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size, self._place = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer, /) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._place)]
        read = os.preadv(self._descriptor, [view], self._offset + self._place) if view else 0
        self._place += read
        return read

    def readall(self) -> bytes:
        # in one go, where it would be a block at a time
        data = os.pread(self._descriptor, max(0, self._size - self._place), self._offset + self._place)
        self._place += len(data)
        return data


class Inflated(io.RawIOBase):
    """What a raw deflate stream of an open file holds, as a file, in little memory however long it is.

    It is read forwards; to go back is to begin anew. `BadImage` while reading, as of `inflate`.
    """

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._packed = Window(descriptor, offset, size)
        self._begin()

    def _begin(self) -> None:
        self._packed.seek(0)
        self._stream, self._place = zlib.decompressobj(-zlib.MAX_WBITS), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += self.length()
        elif whence == os.SEEK_CUR:
            offset += self._place
        if offset < self._place:
            self._begin()
        while self._place < offset and self._next(min(CHUNK_BYTES, offset - self._place)):
            pass
        return self._place

    def length(self) -> int:
        """In bytes; it is read to its end, or up to `MAX_BYTES`."""
        while self._next(CHUNK_BYTES):
            if self._place > MAX_BYTES:
                raise BadImage(f"too large: over {MAX_BYTES} bytes when inflated")
        return self._place

    def readinto(self, buffer, /) -> int:
        view, filled = memoryview(buffer), 0
        while filled < len(view) and (part := self._next(len(view) - filled)):
            view[filled : filled + len(part)] = part
            filled += len(part)
        return filled

    def _next(self, most: int) -> bytes:
        """The next bytes, at most so many; none at the end."""
        while not self._stream.eof:
            packed = self._stream.unconsumed_tail or self._packed.read(CHUNK_BYTES)
            try:
                part = self._stream.decompress(packed or b"", most)
            except zlib.error as err:
                raise BadImage(f"corrupt deflate stream: {err}") from None
            if part:
                self._place += len(part)
                return part
            if not packed:
                raise BadImage("corrupt deflate stream: cut short")
        return b""
