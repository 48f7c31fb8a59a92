"""What `fastbeit index check` found, beside the index in `images.idx.checked`: images that need no check any more.

A safetensors file; its one tensor, of n images:

    mean_grey  float64 [n]  mean luma of the whole image, as `decode.check` gives it; NaN: the image is bad

The metadata hold the format version and the fingerprint of the index. What was found for another index says nothing.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fastbeit.data.index.reader import Index
from fastbeit.errors import DataError
from fastbeit.files import aside, put_in_place

FORMAT = "fastbeit-checked-1"


def checked_path(index: Path) -> Path:
    return index.with_name(index.name + ".checked")


def write_checked(index: Index, mean_grey: np.ndarray) -> None:
    path = checked_path(index.location)
    metadata = {"format": FORMAT, "index": index.fingerprint}
    save_file({"mean_grey": mean_grey.astype(np.float64, copy=False)}, aside(path), metadata)
    put_in_place(path)


def read_checked(index: Index) -> np.ndarray | None:
    """`mean_grey` of an index, mapped; None: it was not checked since it was made.

    Raises:
        DataError: the file is damaged or of another version.
    """
    path = checked_path(index.location)
    try:
        mapped = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise _unusable(path, str(err)) from None
    try:
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:start].tobytes())
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise _unusable(path, f"format {metadata['format']}, wanted {FORMAT}")
        if metadata["index"] != index.fingerprint:
            return None
        first, _ = header["mean_grey"]["data_offsets"]
        return np.ndarray(len(index), np.float64, mapped.data, start + first)
    except (ValueError, KeyError, TypeError) as err:
        raise _unusable(path, f"damaged or cut short, {err}") from None


def _unusable(path: Path, problem: str) -> DataError:
    index = path.with_suffix("")
    return DataError(f"'{path}' cannot be used ({problem}); make it again: fastbeit index check {index}, or delete it")
