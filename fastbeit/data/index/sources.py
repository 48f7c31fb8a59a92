"""What files a source of images is made of: a folder, archives, tables, or a text list.

    folder              its images, flat or in folders of classes, at any depth
    folder of archives  nothing but .tar files, or nothing but .zip files
    a.tar, a.zip        one archive
    'shards-*.tar'      those that there are, by name
    'a-{000..099}.tar'  those that are listed, each of which must be there
    'photos/*/*.jpg'    images by a pattern; ** stands for folders of any depth
    Parquet, datasets   see `tables`
    list.txt            a path a line, and after a TAB its class; relative to the list's folder, or absolute

A source is opened before anything is examined: it knows its files by then, and nothing of the images in them.
"""

import codecs
import glob
import itertools
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastbeit.data.index import tables
from fastbeit.data.index.archives import IMAGE_SUFFIXES, label_of, read_tar, read_zip
from fastbeit.data.index.members import HIDDEN, Member, Reason
from fastbeit.errors import DataError

WANTED = (
    "a folder of images, a pattern of them ('photos/*.jpg'), archives (.tar, .zip, 'shards-*.tar', "
    "'shards-{000..099}.tar'), tables (Parquet, a folder of `datasets`), or a text that lists images"
)
ARCHIVES = {".tar": read_tar, ".zip": read_zip}
ARCHIVE_NAMES = b".tar", b".zip", b".tar.gz", b".tgz"
ARCHIVE_ROWS = 1024  # of successive members, read together: about a shard of a hundred MB
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
SEPARATORS = {b",": "a comma", b";": "a semicolon", b"|": "a bar", b" ": "a space"}
LINES_TRIED = 100  # of a list, for other separators than TAB


class Names:
    """Names in two arrays: of 10 M, a list of Python's own would take three times as much memory."""

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        self.ends, self.letters = array("q"), bytearray()
        for name in names:
            self.append(name)

    def append(self, name: bytes) -> None:
        self.letters += name
        self.ends.append(len(self.letters))

    def extend(self, other: "Names") -> None:
        self.ends.frombytes((np.frombuffer(other.ends, np.int64) + len(self.letters)).tobytes())
        self.letters += other.letters

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return bytes(self.letters[self.ends[i - 1] if i else 0 : self.ends[i]])


@dataclass
class Source:
    """Files that hold images, in order."""

    root: Path
    names: Names  # of the files, relative to the root or absolute
    sizes: list[int] = field(default_factory=list)  # of the files in bytes, where they hold several images
    read: Callable[[Path], Iterator[Member | Reason]] | None = None  # what a file holds; None: it is an image itself
    label_of: Callable[[int], str | int | None] = lambda number: None  # of a file, where that is written
    class_names: list[str] | None = None  # what numbers for labels stand for, where that is written
    block_rows: int = 1
    folders_are_classes: bool = True  # where no label is written of any image
    shared_folders: bool = False  # folders that all images lie in may come first, and are no classes
    skipped: list[Reason] = field(default_factory=list)

    def path(self, number: int) -> bytes:
        return os.path.join(os.fsencode(self.root), self.names[number])


def open_source(source: Path) -> Source:
    """Find the files of a source.

    Raises:
        DataError: it does not exist, is compressed as a whole, or is nothing that is read.
    """
    if source.is_dir():
        archives = _archives_in(source)
        found = None if archives else tables.find_tables(source)
        return _of_archives(archives) if archives else _of_tables(found) if found else _of_folder(source)
    if source.is_file():
        found = tables.find_tables(source)
        return _of_tables(found) if found else _of_archives([source]) if _kind(source) else _of_list(source)
    paths = [Path(path) for pattern in _expand(str(source)) for path in _matches(pattern)]
    if not paths:
        raise DataError(f"'{source}' does not exist; an index is made of {WANTED}")
    if all(path.name.endswith(tables.SUFFIXES) for path in paths):
        return _of_tables(paths)
    are_archives = any(path.name.lower().endswith(tuple(map(os.fsdecode, ARCHIVE_NAMES))) for path in paths)
    return _of_archives(paths) if are_archives or _is_archive(paths[0]) else _of_files(str(source), paths)


def is_pattern(source: Path) -> bool:
    """Whether it stands for paths that only a look at the files there tells."""
    return glob.has_magic(str(source)) or BRACES.search(str(source)) is not None


def _expand(pattern: str) -> Iterator[str]:
    """`a{b,c}{08..10}` to ab08, ab09, ab10, ac08, ...; numbers as wide as the first."""
    braces = BRACES.search(pattern)
    if not braces:
        yield pattern
        return
    between = RANGE.fullmatch(braces[1])
    if between:
        first, last = int(between[1]), int(between[2])
        parts = (f"{number:0{len(between[1])}}" for number in range(first, last + 1))
    else:
        parts = iter(braces[1].split(","))
    for part in parts:
        yield from _expand(pattern[: braces.start()] + part + pattern[braces.end() :])


def _matches(pattern: str) -> list[str]:
    if glob.has_magic(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    if not os.path.exists(pattern):
        raise DataError(f"'{pattern}' does not exist; an index is made of {WANTED}")
    return [pattern]


def _is_archive(path: Path) -> bool:
    return path.is_file() and bool(_kind(path))


def _of_files(pattern: str, paths: list[Path]) -> Source:
    """Images that a pattern names; what stands before its first special letter is their root, as if it were indexed."""
    before = re.split(r"[*?\[{]", pattern)[0]
    source = Source(Path(os.path.abspath(os.path.dirname(before) or ".")), Names())
    for path in paths:
        name = os.path.relpath(os.path.abspath(path), source.root)
        if path.is_dir():
            source.skipped.append(
                (name, "a folder: 'FOLDER/**/*.jpg' finds its images, and so does FOLDER as the source")
            )
        else:
            source.names.append(os.fsencode(name))
    return source


def _archives_in(folder: Path) -> list[Path]:
    """The archives of a folder that holds no images beside them; texts and tables may lie there."""
    found = []
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            # not to list millions of images only to find that they are some
            if _kind_of(entry) == "folder" or entry.name.lower().endswith(IMAGE_SUFFIXES):
                return []
            if entry.name.lower().endswith(ARCHIVE_NAMES):
                found.append(entry.name)
    return [folder / os.fsdecode(name) for name in sorted(found)]


def _kind(path: Path) -> str:
    """ ".tar", ".zip", or "" for what is no archive, by its first bytes, then by its name."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as err:
        raise DataError(f"'{path}' cannot be read: {err.strerror or err}") from None
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"'{path}' is compressed by {name}: its images cannot be read one by one; uncompress it first, which "
                "makes it hardly larger, as images are compressed already"
            )
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return ".zip"
    if head[257:262] == b"ustar":
        return ".tar"
    return path.suffix.lower() if path.suffix.lower() in ARCHIVES else ""


def _of_archives(paths: list[Path]) -> Source:
    kinds = {kind: path for path in paths for kind in [_kind(path)]}
    if len(kinds) > 1 or "" in kinds:
        told = ", ".join(f"'{path}' is {kind or 'neither'}" for kind, path in kinds.items())
        raise DataError(f"wanted files that are all .tar, or all .zip: {told}")
    (kind,) = kinds
    return Source(*_below_common_folder(paths), ARCHIVES[kind], block_rows=ARCHIVE_ROWS, shared_folders=True)


def _of_tables(paths: list[Path]) -> Source:
    groups = Counter(rows for path in paths if path.suffix == ".parquet" for rows in tables.row_groups(path))
    if warning := tables.slow_row_groups(paths):
        print(f"fastbeit index: {warning}", file=sys.stderr)
    return Source(
        *_below_common_folder(paths),
        tables.read_table,
        class_names=tables.class_names(paths),
        block_rows=groups.most_common(1)[0][0] if groups else ARCHIVE_ROWS,
    )


def _below_common_folder(paths: list[Path]) -> tuple[Path, Names, list[int]]:
    """`root`, `names` and `sizes` of a Source."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return root, Names(os.fsencode(path.relative_to(root)) for path in paths), [os.path.getsize(path) for path in paths]


def _of_list(path: Path) -> Source:
    """The images that a text names; one that it names twice counts twice."""
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"'{path}' is a text in UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    if b"\0" in head:
        raise DataError(f"'{path}' is no text; an index is made of {WANTED}")
    common = _common_folder(path)
    root = Path(os.fsdecode(common)) if common else Path(os.path.abspath(path)).parent
    _refuse_other_separators(path)
    source = Source(root, Names(), folders_are_classes=False)
    classes: dict[str | int | None, int] = {}
    labels = array("i")
    for name, text in _lines(path):
        try:
            label = label_of(text)
        except ValueError as err:
            source.skipped.append((os.fsdecode(name), f"its class cannot be read: {err}"))
            continue
        source.names.append(name.removeprefix(common + b"/") if common else name)
        labels.append(classes.setdefault(label, len(classes)))
    written = list(classes)
    source.label_of = lambda number: written[labels[number]]
    return source


def _lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Path and class, which may be "", of each line."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            # a sign of UTF-8 that some editors write before the first
            line = line if number else line.removeprefix(codecs.BOM_UTF8)
            name, _, label = line.rstrip(b"\r\n").partition(b"\t")
            if name.strip() and not name.startswith(b"#"):
                yield name, os.fsdecode(label.strip())


def _refuse_other_separators(path: Path) -> None:
    """
    Raises:
        DataError: paths and classes are parted by something else than TAB.
    """
    folder = os.fsencode(os.path.dirname(os.path.abspath(path)))
    for name, label in itertools.islice(_lines(path), LINES_TRIED):
        if label or os.path.exists(os.path.join(folder, name)):
            continue
        for separator, called in SEPARATORS.items():
            # before the first or the last of them, as names may have some too
            for first in {name.partition(separator)[0], name.rpartition(separator)[0]}:
                if first and os.path.isfile(os.path.join(folder, first.strip(b' "'))):
                    raise DataError(
                        f"'{path}' parts paths and classes by {called} ('{os.fsdecode(name)}'); wanted a TAB: "
                        "PATH<TAB>CLASS"
                    )


def _common_folder(path: Path) -> bytes | None:
    """Of the images of a list that are all named from the root of the file system."""
    common: bytes | None = None
    for name, _ in _lines(path):
        if not os.path.isabs(name):
            return None
        folder = os.path.dirname(name)
        if folder != common:
            common = os.path.commonpath([common or folder, folder])
    return common


def _of_folder(source: Path) -> Source:
    """All files below a folder; hidden ones, and what is in hidden folders, are skipped.

    Links are followed, every folder is read once.
    """
    found = Source(Path(os.path.abspath(source)), Names())
    root = os.fsencode(source)
    seen: set[tuple[int, int]] = set()
    pending = [b""]
    while pending:
        relative = pending.pop()
        try:
            folder = os.path.join(root, relative)
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            if identity in seen:
                # a link to a folder above or beside: to follow it again might never end
                found.skipped.append((os.fsdecode(relative), "folder was read under another name"))
                continue
            seen.add(identity)
            kinds = {"folder": [], "file": []}
            with os.scandir(folder) as entries:
                for entry in entries:
                    kind = HIDDEN if entry.name.startswith(b".") else _kind_of(entry)
                    kinds.setdefault(kind, []).append(os.path.join(relative, entry.name))
        except OSError as err:
            found.skipped.append((os.fsdecode(relative), f"unreadable folder: {err.strerror}"))
            continue
        folders, files = sorted(kinds.pop("folder")), sorted(kinds.pop("file"))
        for name in files:
            found.names.append(name)
        found.skipped += [(os.fsdecode(name), kind) for kind, names in kinds.items() for name in sorted(names)]
        pending.extend(reversed(folders))
    return found


def _kind_of(entry: os.DirEntry) -> str:
    """ "folder", "file", or why it is neither; a link is what it leads to."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:
        # a link that leads to itself
        return "broken link"
    # to open a named pipe would wait for ever
    return "broken link" if entry.is_symlink() else "not a regular file"
