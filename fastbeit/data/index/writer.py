"""Images that were found, by columns, and the index file that is made of them."""

import json
import os
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbeit.checksums import block_sums
from fastbeit.data.index.archives import MAX_CLASSES
from fastbeit.data.index.members import Member
from fastbeit.data.index.reader import COLUMNS, FORMAT, ROW_COLUMNS, fingerprint_of, header_sum
from fastbeit.data.index.sources import Names, Source
from fastbeit.errors import DataError
from fastbeit.files import aside, put_in_place

DTYPES = {
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint32): "U32",
    np.dtype(np.uint16): "U16",
    np.dtype(np.uint8): "U8",
}

Label = int | str | bytes  # a number, a name, or the folder of an image of which neither is written


class Look(NamedTuple):
    """What was seen of an image."""

    height: int  # upright, in pixels
    width: int
    low: int  # least and largest value, of one of 16 bits a channel, else 0
    high: int
    sample: int  # `members.content_sample`


class Rows:
    """Images that were found, by columns."""

    def __init__(self) -> None:
        self.columns = {name: array(np.dtype(COLUMNS[name]).char) for name in ROW_COLUMNS}
        self.names = Names()
        self.labels: dict[Label, int] = {}  # the column "label" numbers them in the order of their coming

    def __len__(self) -> int:
        return len(self.names)

    def add(self, number: int, member: Member, look: Look) -> None:
        """An image of file `number`."""
        label = os.path.dirname(member.name) if member.label is None else member.label
        label = self.labels.setdefault(label, len(self.labels))
        row = member.offset, member.size, number, label, *look, member.packed
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        self.names.append(member.name)

    def extend(self, other: "Rows") -> None:
        renumbered = [self.labels.setdefault(label, len(self.labels)) for label in other.labels]
        for name, column in other.columns.items():
            if name == "label":
                column = array(column.typecode, [renumbered[label] for label in column])
            self.columns[name].extend(column)
        self.names.extend(other.names)


@dataclass(frozen=True)
class Table:
    """What an index file holds."""

    source: Source
    class_names: list[str]
    columns: dict[str, np.ndarray]
    num_skipped: int

    def __len__(self) -> int:
        return len(self.columns["size"])

    def select(self, chosen: np.ndarray) -> "Table":
        """The images of which `chosen`, [n] bool, is true; classes keep their numbers."""
        columns = {name: column[chosen] if name in ROW_COLUMNS else column for name, column in self.columns.items()}
        # of an archive all stay: other images may lie in it
        names = "member" if self.source.read else "file"
        ends = self.columns[f"{names}_ends"]
        lengths = np.diff(ends, prepend=0)
        columns[f"{names}_names"] = self.columns[f"{names}_names"][np.repeat(chosen, lengths)]
        columns[f"{names}_ends"] = np.cumsum(lengths[chosen])
        if not self.source.read:
            columns["file"] = np.arange(np.count_nonzero(chosen), dtype=np.int32)
        return replace(self, columns=columns)


def make_table(rows: Rows, source: Source, num_skipped: int) -> Table:
    """The table of the images that were found; `DataError` when a class is none."""
    class_names, classes = _classes(list(rows.labels), source)
    return Table(source, class_names, _make_columns(rows, classes, source), num_skipped)


def write_index(table: Table, output: Path) -> None:
    """Write an index file, whole or not at all."""
    source, columns = table.source, table.columns
    metadata = {
        "format": FORMAT,
        # JSON, since it can write names that are not UTF-8
        "root": json.dumps(str(source.root)),
        "class_names": json.dumps(table.class_names),
        "block_rows": str(source.block_rows),
        "num_images": str(len(table)),
        "num_skipped": str(table.num_skipped),
        "fingerprint": fingerprint_of(columns),
        "checksums": json.dumps({name: block_sums(column) for name, column in columns.items()}),
    }
    _save(columns, metadata, aside(output))
    put_in_place(output)


def _classes(labels: list[Label], source: Source) -> tuple[list[str], list[int]]:
    """The names of the classes, and of each label the class, -1: none."""
    written = [label for label in labels if not isinstance(label, bytes)]
    numbers = [label for label in written if isinstance(label, int)]
    if not written and not source.folders_are_classes:
        names = {}
    elif not written:
        names = _class_folders([label for label in labels if isinstance(label, bytes)], source.shared_folders)
    elif len(numbers) < len(written):
        names: dict[Label, str] = {label: str(label) for label in written}
    else:
        if max(numbers) >= (most := len(source.class_names or range(MAX_CLASSES))):
            raise DataError(f"class {max(numbers)} of '{source.root}', but there are at most {most} classes, from 0 on")
        class_names = source.class_names or [str(number) for number in range(max(numbers) + 1)]
        return class_names, [label if isinstance(label, int) else -1 for label in labels]
    class_names = sorted(set(names.values()), key=os.fsencode)
    class_of = {name: number for number, name in enumerate(class_names)}
    return class_names, [class_of[names[label]] if label in names else -1 for label in labels]


def _class_folders(folders: list[bytes], shared: bool) -> dict[Label, str]:
    """The class of each folder that images lie in: its first part; when `shared`, behind what all begin with."""
    parts = {folder: [part for part in folder.split(b"/") if part not in (b"", b".")] for folder in folders}
    first = 0
    while shared and len({tuple(path[: first + 1]) for path in parts.values()}) == 1 and _all_longer(parts, first + 1):
        first += 1
    return {folder: os.fsdecode(path[first]) for folder, path in parts.items() if len(path) > first}


def _all_longer(parts: dict[bytes, list[bytes]], length: int) -> bool:
    return all(len(path) > length for path in parts.values())


def _make_columns(rows: Rows, classes: list[int], source: Source) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {name: np.asarray(column) for name, column in rows.columns.items()}
    columns["label"] = np.array(classes, np.int32)[columns["label"]]
    files, members = (source.names, rows.names) if source.read else (rows.names, Names())
    if not source.read:
        columns["file"] = np.arange(len(rows))
    found = {"member_ends": members.ends, "member_names": members.letters, "file_sizes": source.sizes}
    columns |= {name: np.asarray(values) for name, values in found.items()}
    columns |= {"file_ends": np.asarray(files.ends), "file_names": np.asarray(files.letters)}
    return {name: columns[name].astype(dtype, copy=False) for name, dtype in COLUMNS.items()}


def _save(columns: dict[str, np.ndarray], metadata: dict[str, str], path: Path) -> None:
    """As safetensors' own `save_file`, which would hold all columns a second time."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, column in columns.items():
        header[name] = {
            "dtype": DTYPES[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [end, end := end + column.nbytes],
        }
    metadata["header_sum"] = str(header_sum(header))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns.values():
            file.write(column.data)
