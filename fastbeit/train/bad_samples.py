"""Bad images of a run: listed once each, and too many of them end it."""

import json
from pathlib import Path

from fastbeit.data.reading import bad_limit
from fastbeit.errors import DATA_LIMIT, DataError


class BadSamples:
    """The list of bad images in a run's directory; stops the run when it grows too long.

    Args:
        path: of the list; all ranks read and count, so that all end in the same step.
        writes: whether this rank keeps the list.
    """

    def __init__(self, path: Path, num_images: int, writes: bool = True) -> None:
        self.path, self._limit, self._writes = path, bad_limit(num_images), writes
        self._seen: set[int] = set()
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                self._seen.add(json.loads(line)["sample"])
            except ValueError:
                # the line that an interruption cut short; the image will be met again
                continue
        if writes and text and not text.endswith("\n"):
            # appended: other ranks are reading
            with path.open("a") as file:
                file.write("\n")

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
            if self._writes:
                with self.path.open("a") as file:
                    file.write(json.dumps({"sample": sample, "reason": reason}) + "\n")
        if len(self._seen) > self._limit:
            raise DataError(
                f"{len(self._seen)} bad images, more than the limit of {self._limit} (100, or 1 % of the "
                f"images if that is more), listed in '{self.path}'; repair or remove them and make the index again",
                DATA_LIMIT,
            )
