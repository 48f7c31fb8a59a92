"""List the images of a source: the index is written, and beside it what was left out and why."""

from pathlib import Path

from fastbeit.data.index.given import list_images, skipped_path
from fastbeit.data.index.scan import Division
from fastbeit.errors import DONE


def index(source: Path, output: Path, division: Division | None = None) -> int:
    """Write the index of a folder, of shards or of tables, or two that divide it; returns the exit code.

    Raises:
        DataError: there is no image in it, or there are too few to be divided (66).
        RunError: an index (73) or the list beside it (74) cannot be written.
    """
    summary = list_images(source, output, division)
    print(summary)
    if summary.skipped:
        print(f"skipped files are listed in {skipped_path(output)}")
    return DONE
