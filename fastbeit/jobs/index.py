"""List the images of a source: the index is written, and beside it what was left out and why."""

from pathlib import Path

from fastbeit.data.index.checked import checked_path
from fastbeit.data.index.scan import Division, build_index
from fastbeit.data.index.summary import write_skipped
from fastbeit.errors import DONE, writing


def index(source: Path, output: Path, division: Division | None = None) -> int:
    """Write the index of a folder, of shards or of tables, or two that divide it; returns the exit code.

    Raises:
        DataError: there is no image in it, or there are too few to be divided (66).
        RunError: an index (73) or the list beside it (74) cannot be written.
    """
    summary = build_index(source, output, division=division)
    print(summary)
    listed = output.with_name(output.name + ".skipped")
    with writing(f"'{listed}'"):
        # what was checked of an earlier index says nothing of this one, even where it is the same: a file may be
        # repaired
        for path in (listed, *map(checked_path, summary.written)):
            path.unlink(missing_ok=True)
        if summary.skipped:
            write_skipped(listed, summary.skipped)
    if summary.skipped:
        print(f"skipped files are listed in {listed}")
    return DONE
