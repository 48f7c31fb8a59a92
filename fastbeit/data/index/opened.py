"""The images of a SOURCE for the time of a job: an index, or whatever `fastbeit index` takes."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastbeit.config.sections import Levels
from fastbeit.data.index.reader import Index, is_index, open_index
from fastbeit.data.index.scan import build_index


@contextlib.contextmanager
def opened(source: Path, levels: Levels) -> Iterator[Index]:
    """
    Args:
        levels: of 16-bit images, as `data.levels`.

    Raises:
        DataError: there is no image in it (66).
        ConfigError: these levels would leave next to nothing of its images.
    """
    if is_index(source):
        yield open_index(source, levels)
        return
    with tempfile.TemporaryDirectory(prefix="fastbeit-") as folder:
        path = Path(folder) / "images.idx"
        print(build_index(source, path), file=sys.stderr)
        yield open_index(path, levels)
