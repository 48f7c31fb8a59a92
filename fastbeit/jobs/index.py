"""List the images of a source: the index is written, and beside it what was left out and why."""

from pathlib import Path

from fastbeit.data.index.checked import checked_path
from fastbeit.data.index.scan import build_index
from fastbeit.errors import DONE


def index(source: Path, output: Path) -> int:
    """Write the index of a folder, of shards or of tables; returns the exit code.

    Raises:
        DataError: there is no image in it (66).
    """
    summary = build_index(source, output)
    print(summary)
    listed = output.with_name(output.name + ".skipped")
    # those of an earlier index say nothing of this one, even where it is the same: a file may have been repaired
    for path in (listed, checked_path(output)):
        path.unlink(missing_ok=True)
    if summary.skipped:
        listed.write_text("".join(f"{path!r}: {reason}\n" for path, reason in summary.skipped))
        print(f"skipped files are listed in {listed}")
    return DONE
