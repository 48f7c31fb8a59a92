"""Bad images of a run: listed once each, and too many of them end it."""

import json
from pathlib import Path

from fastbeit.data.reading import bad_limit
from fastbeit.errors import DATA_LIMIT, DataError, RunError, writing
from fastbeit.files import append_line, read_records


class BadSamples:
    """The list of bad images in a run's directory; stops the run when it grows too long.

    Args:
        path: of the list; all ranks read and count, so that all end in the same step.
        writes: whether this rank keeps the list.
        anew: begin the list, whatever is there.
    """

    def __init__(self, path: Path, num_images: int, writes: bool = True, anew: bool = False) -> None:
        self.path, self._limit, self._writes = path, bad_limit(num_images), writes
        self.error: RunError | None = None  # of writing: raised by the loop, which saves first
        # an image of a line that cannot be read will be met again
        records, self.problem = ([], "") if anew else read_records(path)
        self._seen = {one["sample"] for one in records if type(one.get("sample")) is int}
        if anew and writes:
            with writing(f"'{path}'"):
                path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, bad: list[tuple[int, str]]) -> None:
        """List those not yet listed.

        Raises:
            DataError: more than `bad_limit` images are bad (exit code 65).
        """
        for sample, reason in bad:
            if sample in self._seen:
                continue
            self._seen.add(sample)
            if self._writes and not self.error:
                self._write(json.dumps({"sample": sample, "reason": reason}))
        if len(self._seen) > self._limit:
            raise DataError(
                f"{len(self._seen)} bad images, more than the limit of {self._limit} (100, or 1 % of the "
                f"images if that is more), listed in '{self.path}'; repair or remove them and make the index again",
                DATA_LIMIT,
            )

    def _write(self, line: str) -> None:
        try:
            with writing(f"'{self.path}'", "make room, and run the same command again"):
                append_line(self.path, line)
        except RunError as err:
            self.error = err
