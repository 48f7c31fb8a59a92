"""Photos for the demo, made small: those that scikit-image, scikit-learn and sporco carry, or the user's own."""

import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from fastbeit.data.decode import decode, read_header
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.errors import DATA_MISSING, USAGE, BadImage, RunError, writing
from fastbeit.files import aside, make_folder, move_folder, unmake

FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "sporco": "data"}
# photographs only: no drawings, no text, no masks; the two views of one motorcycle stand on one side
TRAINING: dict[str, Sequence[str]] = {
    "skimage": """astronaut.png brick.png cell.png clock_motion.png coins.png grass.png gravel.png hubble_deep_field.jpg
        ihc.png microaneurysms.png moon.png motorcycle_left.png motorcycle_right.png retina.jpg rocket.jpg""".split(),
    "sklearn": ["china.jpg"],
    "sporco": ["kodim23.png", "monarch.png", "sail.png", "tulips.png"],
}
# an animal, a thing, a flower, a room, and one that is gray as half of the others are
HELD_OUT: dict[str, Sequence[str]] = {
    "skimage": ["camera.png", "chelsea.png", "coffee.png"],
    "sklearn": ["flower.jpg"],
    "sporco": ["barbara.png"],
}
LONGEST_SIDE = 512  # enough for crops of 64 pixels, and quick to decode
MAX_PHOTOS = 400  # of a user's folder: what a demo of minutes can look at
HELD_OUT_EVERY = 6  # every sixth photo of a user's folder is held out


def gather_photos(folder: Path, source: Path | None) -> tuple[int, int]:
    """Put photos to learn from into `folder/train` and others into `folder/held_out`, once.

    Args:
        source: a folder with at least two images; None: the photos of the packages.

    Returns:
        How many of each.

    Raises:
        RunError: too few photos, or the packages are not installed (66); `folder` holds photos of another source (2).
    """
    note, wanted = folder / "source.txt", str(source.resolve()) if source else "installed packages"
    if not note.is_file():
        # made aside: what an interruption leaves is not taken for the whole
        unfinished, made = aside(folder), make_folder(folder.parent)
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with writing(f"photos in '{folder}'"):
                for part in ("train", "held_out"):
                    (unfinished / part).mkdir(parents=True)
                for photo, target in _own(source, unfinished) if source else _packaged(unfinished):
                    photo.save(target, "JPEG", quality=95)
                (unfinished / note.name).write_text(wanted)
                move_folder(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            unmake(made)
    elif note.read_text() != wanted:
        raise RunError(
            f"'{folder}' holds photos of {note.read_text()}, wanted those of {wanted}; choose another --out", USAGE
        )
    return len(list((folder / "train").iterdir())), len(list((folder / "held_out").iterdir()))


def _packaged(folder: Path) -> Iterator[tuple[Image.Image, Path]]:
    """Each photo and where it goes."""
    found = {"train": _installed(TRAINING), "held_out": _installed(HELD_OUT)}
    if not all(found.values()):
        raise RunError(
            "the demo wants photos of scikit-image, scikit-learn and sporco, which are not installed; "
            "pip install 'fastbeit[demo]', or use photos of your own: fastbeit demo --data DIR",
            DATA_MISSING,
        )
    for part, paths in found.items():
        for path in paths:
            yield _shrink(path.read_bytes()), folder / part / f"{path.stem}.jpg"


def _installed(photos: dict[str, Sequence[str]]) -> list[Path]:
    paths = []
    for package, names in photos.items():
        # found, not imported: their import takes seconds and brings more packages along
        spec = find_spec(package)
        places = (spec and spec.submodule_search_locations) or []
        paths += [Path(place) / FOLDERS[package] / name for place in places for name in names]
    return [path for path in paths if path.is_file()]


def _own(source: Path, folder: Path) -> Iterator[tuple[Image.Image, Path]]:
    """As `_packaged`, from all over the folder `source`; what cannot be used is said."""
    print(f"{source}: {build_index(source, folder / 'source.idx')}")
    index, number = open_index(folder / "source.idx", "high_byte"), 0
    if len(index) > MAX_PHOTOS:
        print(f"the demo looks at {MAX_PHOTOS} of them at most, evenly spread")
    for i in range(0, len(index), -(-len(index) // MAX_PHOTOS)):
        try:
            photo = _shrink(index.read_bytes(i))
        except BadImage as err:
            print(f"passed over: '{index.name(i)}': {err}", file=sys.stderr)
            continue
        yield photo, folder / ("train" if number % HELD_OUT_EVERY else "held_out") / f"{number:04}.jpg"
        number += 1
    if number < 2:
        raise RunError(
            f"the demo wants at least 2 photos, one to learn from and one to be asked about; '{source}' has {number}",
            DATA_MISSING,
        )


def _shrink(data: bytes) -> Image.Image:
    photo = Image.fromarray(decode(data, read_header(io.BytesIO(data))))
    # a first, coarse step makes the resampling of a large photo several times as fast
    photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE), reducing_gap=2)
    return photo
