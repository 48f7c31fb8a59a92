"""What `fastbeit index check` found, beside the index in `images.idx.checked`: images that need no check any more.

A safetensors file; its one tensor, of n images:

    mean_grey  float64 [n]  mean luma of the whole image, as `decode.check` gives it; NaN: the image is bad

The metadata hold the format version, the fingerprint of the index and a checksum. What was found for another index, or
cannot be read any more, says nothing: images are then checked when they are used.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fastbeit.data.index.reader import Index
from fastbeit.files import aside, put_in_place

FORMAT = "fastbeit-checked-2"


def checked_path(index: Path) -> Path:
    return index.with_name(index.name + ".checked")


def write_checked(index: Index, mean_grey: np.ndarray) -> None:
    path = checked_path(index.location)
    mean_grey = mean_grey.astype(np.float64, copy=False)
    metadata = {"format": FORMAT, "index": index.fingerprint, "crc32": str(zlib.crc32(mean_grey.data))}
    save_file({"mean_grey": mean_grey}, aside(path), metadata)
    put_in_place(path)


def read_checked(index: Index) -> np.ndarray | None:
    """`mean_grey` of an index, mapped; None: it was not checked since it was made, or what was found cannot be read."""
    path = checked_path(index.location)
    try:
        mapped = np.memmap(path, np.uint8, mode="r")
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:start].tobytes())
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}, wanted {FORMAT}")
        if metadata["index"] != index.fingerprint:
            return None
        first, _ = header["mean_grey"]["data_offsets"]
        mean_grey = np.ndarray(len(index), np.float64, mapped.data, start + first)
        if zlib.crc32(mean_grey.data) != int(metadata["crc32"]):
            raise ValueError("it differs from its checksum")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as err:
        print(
            f"'{path}' is passed over ({str(err) or type(err).__name__}): each image is checked when it is used; to "
            f"make it again: fastbeit index check {index.location}",
            file=sys.stderr,
            flush=True,
        )
        return None
    return mean_grey
