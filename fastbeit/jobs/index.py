"""List the images of a source: the index is written, and beside it what was left out and why."""

from pathlib import Path

from fastbeit.data.index.checked import checked_path
from fastbeit.data.index.scan import build_index
from fastbeit.errors import DONE, writing
from fastbeit.files import write_whole


def index(source: Path, output: Path) -> int:
    """Write the index of a folder, of shards or of tables; returns the exit code.

    Raises:
        DataError: there is no image in it (66).
        RunError: the index (73) or the list beside it (74) cannot be written.
    """
    summary = build_index(source, output)
    print(summary)
    listed = output.with_name(output.name + ".skipped")
    # those of an earlier index say nothing of this one, even where it is the same: a file may have been repaired
    with writing(f"'{listed}'"):
        for path in (listed, checked_path(output)):
            path.unlink(missing_ok=True)
        if summary.skipped:
            write_whole(listed, "".join(f"{path!r}: {reason}\n" for path, reason in summary.skipped))
    if summary.skipped:
        print(f"skipped files are listed in {listed}")
    return DONE
