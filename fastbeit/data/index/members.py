"""Images that lie inside other files: in tar and zip archives, and in tables."""

import io
import os
import zlib
from dataclasses import dataclass

from fastbeit.data.decode import MAX_PIXELS
from fastbeit.errors import BadImage

# how the bytes of an image are kept
PLAIN = 0  # as they are
DEFLATE = 1  # as a raw deflate stream, in a zip
TABLE = 2  # in a row of a Parquet file

MAX_BYTES = 8 * MAX_PIXELS + (1 << 24)  # the largest image without compression, 16-bit RGBA, and what stands around it

Reason = tuple[str, str]  # the name of what is not used, "" for the whole file, and why


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a file of several, or what says that it is one: nobody has looked at its bytes yet."""

    name: bytes
    offset: int  # in bytes; of a TABLE: the row
    size: int  # in bytes, as they stand in the file; of a TABLE: of the image
    packed: int
    label: str | int | None  # name of the class, or its number


def inflate(data: bytes) -> bytes:
    """What a raw deflate stream holds; `BadImage` when it is damaged, or longer than an image can be."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, MAX_BYTES)
    except zlib.error as err:
        raise BadImage(f"corrupt deflate stream: {err}") from None
    if not stream.eof:
        raise BadImage(
            f"too large: over {MAX_BYTES} bytes when inflated"
            if len(inflated) == MAX_BYTES
            else "corrupt deflate stream: cut short"
        )
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
