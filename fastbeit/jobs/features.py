"""`fastbeit features`: what a model makes of the images of a source, as a file."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from fastbeit.config.running import EngineConfig
from fastbeit.data.index.given import opened
from fastbeit.data.index.reader import Index
from fastbeit.engine.ranks import device_of
from fastbeit.errors import CANNOT_CREATE, DATA_MISSING, DONE, USAGE, DataError, RunError, writing
from fastbeit.evaluate.feature_file import RowFile
from fastbeit.evaluate.features import Kind, check_blocks, features_of, look_at
from fastbeit.evaluate.frozen import Frozen, ModelSource, open_frozen
from fastbeit.files import aside, put_in_place, try_to_write
from fastbeit.plural import counted
from fastbeit.train.stop import Stop


def features(model: ModelSource, source: Path, output: Path, kind: Kind, blocks: list[int] | None) -> int:
    """Write `output`, and beside it the paths of its rows; both whole or not at all. Returns the exit code.

        block_<i>  float32 [n, D], for concat [n, 2 D], for patches [n, grid height, grid width, D]
        row        int64 [n]  of the index
        label      int64 [n]  into class_names, which is in the metadata; -1: none. Not there where no image has one

    `features.paths.json` is a list of n paths; `features.bad` lists the bad images, which have no row, with reasons.

    Args:
        source: an index, or whatever `fastbeit index` takes.

    Raises:
        DataError: there is no image in the source, or none is valid (66).
        RunError: a file cannot be written (73; 74 where the disk is full); no such block (2).
        KeyboardInterrupt: stopped; nothing is left.
    """
    frozen = open_frozen(model, device_of(EngineConfig()))
    wanted = check_blocks(blocks, frozen.depth)
    paths, bad = output.with_suffix(".paths.json"), output.with_suffix(".bad")
    if output in (paths, bad):
        raise RunError(f"-o '{output}': that is where the list beside it goes; take another name", USAGE)
    with writing(f"'{output}'", exit_code=CANNOT_CREATE):
        try_to_write(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            opened(source, frozen.data.levels) as index,
            RowFile(output) as file,
            _list(paths) as listed,
            _list(bad) as refused,
            Stop() as stop,
        ):
            num_bad = _fill(frozen, index, kind, wanted, file, listed, refused, stop)
            if stop.wanted:
                raise KeyboardInterrupt
            if not file.num_rows:
                raise DataError(f"none of the {len(index)} images of '{source}' is valid", DATA_MISSING)
            listed.write("\n]\n")
            for left in (output, paths, bad):
                # of an earlier call: a kill from here on leaves no rows beside the paths of others
                left.unlink(missing_ok=True)
            for path, stream in ((paths, listed), (bad, refused)):
                stream.close()
                if path is paths or num_bad:
                    put_in_place(path)
            file.finish(_metadata(frozen, index, kind))
    print(f"{output}: {counted(file.num_rows, 'row')}, {kind} of block {', '.join(map(str, wanted))}; paths: {paths}")
    if num_bad:
        print(f"{counted(num_bad, 'bad image')} left out, listed in {bad}")
    return DONE


def _fill(
    frozen: Frozen,
    index: Index,
    kind: Kind,
    blocks: list[int],
    file: RowFile,
    listed: IO[str],
    refused: IO[str],
    stop: Stop,
) -> int:
    """All rows; returns how many images are bad."""
    num_bad, has_labels = 0, bool((index.labels >= 0).any())
    for batch, found in look_at(
        frozen.data,
        index,
        lambda images: features_of(frozen.model, images, blocks, kind),
        frozen.device,
        stop,
        "features",
    ):
        # repr, since a name may hold anything
        refused.writelines(f"{reason!r}\n" for _, reason in batch.bad)
        num_bad += len(batch.bad)
        if found is None:
            continue
        row = batch.sample.numpy()
        for i in row.tolist():
            listed.write(("[\n " if not listed.tell() else ",\n ") + json.dumps(index.name(i)))
        label = {"label": index.labels[row].astype(np.int64)} if has_labels else {}
        file.add({f"block_{block}": values.cpu().numpy() for block, values in found.items()} | {"row": row} | label)
    return num_bad


def _metadata(frozen: Frozen, index: Index, kind: Kind) -> dict[str, str]:
    origin = frozen.origin
    return {
        "kind": kind,
        "norm": "none",
        "model": f"{origin.dialect}: {origin.file}",
        "model_sha256": origin.sha256,
        "index": index.fingerprint,
        "image_size": json.dumps(frozen.data.image_size),
        "class_names": json.dumps(index.class_names),
    }


@contextlib.contextmanager
def _list(path: Path) -> Iterator[IO[str]]:
    """A text that is written aside, and goes unless it was put in its place."""
    try:
        with aside(path).open("w", encoding="utf-8") as file:
            yield file
    finally:
        aside(path).unlink(missing_ok=True)
