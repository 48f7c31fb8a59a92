"""A safetensors file that is written row by row: how many rows there will be is not known, and they are not kept.

Each tensor grows in a file of its own beside it; at the end they become one, whole or not at all.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import IO

import numpy as np

from fastbeit.files import aside, put_in_place

DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}


class RowFile:
    """
    Args:
        path: of the file; when the context ends without `finish`, nothing is left.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.num_rows = path, 0
        self._parts: dict[str, IO[bytes]] = {}
        self._like: dict[str, np.ndarray] = {}  # the first rows' dtype and shape

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *exception: object) -> None:
        for name, part in self._parts.items():
            part.close()
            self._part_path(name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            aside(self.path).unlink(missing_ok=True)

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """As many rows of each tensor, always of the same tensors: float32 or int64."""
        for name, values in rows.items():
            if name not in self._parts:
                self._like[name] = values[:0]
                self._parts[name] = self._part_path(name).open("wb")
            self._parts[name].write(np.ascontiguousarray(values).data)
        self.num_rows += len(next(iter(rows.values())))

    def finish(self, metadata: dict[str, str]) -> None:
        """Put the file in its place."""
        # those of wide numbers first, so that all begin at a multiple of their width
        names = sorted(self._parts, key=lambda name: -self._like[name].itemsize)
        header: dict[str, object] = {"__metadata__": metadata}
        start = 0
        for name in names:
            like, part = self._like[name], self._parts[name]
            part.flush()
            size = part.tell()
            shape = [self.num_rows, *like.shape[1:]]
            header[name] = {"dtype": DTYPES[like.dtype], "shape": shape, "data_offsets": [start, start + size]}
            start += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with aside(self.path).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                with self._part_path(name).open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        put_in_place(self.path)

    def _part_path(self, name: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{name}.part")
