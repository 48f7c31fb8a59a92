"""Real photos for the demo: those that scikit-image, scikit-learn and sporco carry, or a folder of the user's own."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageOps

from fastbeit.errors import DATA_MISSING, RunError

FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "sporco": "data"}
# photographs only: no drawings, no text, no masks; the two views of one motorcycle stand on one side
TRAINING: dict[str, Sequence[str]] = {
    "skimage": """astronaut.png brick.png camera.png cell.png clock_motion.png coins.png grass.png gravel.png
        hubble_deep_field.jpg ihc.png microaneurysms.png moon.png motorcycle_left.png motorcycle_right.png retina.jpg
        rocket.jpg""".split(),
    "sklearn": ["china.jpg"],
    "sporco": ["kodim23.png", "monarch.png", "tulips.png"],
}
HELD_OUT: dict[str, Sequence[str]] = {
    "skimage": ["chelsea.png", "coffee.png"],
    "sklearn": ["flower.jpg"],
    "sporco": ["barbara.png", "sail.png"],
}
LONGEST_SIDE = 512  # enough for crops of 64 pixels, and quick to decode
MAX_PHOTOS = 2000  # of a user's folder: a demo of minutes cannot look at more
HELD_OUT_SHARE = 6  # every sixth photo of a user's folder is held out


def gather_photos(folder: Path, source: Path | None) -> tuple[int, int]:
    """Put photos to train on into `folder/train`, others into `folder/held_out`: JPEG, longest side `LONGEST_SIDE`.

    Args:
        source: a folder with at least two images; None: the photos of the packages.

    Returns:
        How many of each.

    Raises:
        RunError: there are too few photos, or the packages are not installed (66).
    """
    parts = _split(source) if source else {"train": _installed(TRAINING), "held_out": _installed(HELD_OUT)}
    for part, paths in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(paths):
            target = folder / part / f"{number:04}-{path.stem}.jpg"
            if not target.exists():
                _shrink(path, target)
    return len(parts["train"]), len(parts["held_out"])


def _installed(photos: dict[str, Sequence[str]]) -> list[Path]:
    wanted, found = sum(map(len, photos.values())), []
    for package, names in photos.items():
        # found, not imported: their import takes seconds and brings more packages along
        spec = find_spec(package)
        folders = (spec and spec.submodule_search_locations) or []
        paths = [Path(folder) / FOLDERS[package] / name for folder in folders for name in names]
        found += [path for path in paths if path.is_file()]
    if len(found) < wanted // 2:
        raise RunError(
            f"the demo wants photos of scikit-image, scikit-learn and sporco, and found {len(found)} of {wanted}; "
            "pip install 'fastbeit[demo]', or use photos of your own: fastbeit demo --data DIR",
            DATA_MISSING,
        )
    return found


def _split(source: Path) -> dict[str, list[Path]]:
    if not source.is_dir():
        raise RunError(f"--data wants a folder of photos; '{source}' is none", DATA_MISSING)
    paths = [path for path in sorted(source.rglob("*")) if path.is_file() and _is_image(path)]
    if len(paths) < 2:
        raise RunError(
            f"--data wants at least 2 photos, one to learn from and one to be asked about; '{source}' has {len(paths)}",
            DATA_MISSING,
        )
    paths = paths[:: -(-len(paths) // MAX_PHOTOS)]
    held_out = paths[::HELD_OUT_SHARE]
    return {"train": [path for path in paths if path not in held_out], "held_out": held_out}


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
        return True
    # Pillow raises nearly any type on files that are no images
    except Exception:
        return False


def _shrink(path: Path, target: Path) -> None:
    with Image.open(path) as image:
        # decoded at once at a smaller size, where the format can
        image.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))
        photo = ImageOps.exif_transpose(image).convert("RGB")
    photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    unfinished = target.with_suffix(".part")
    photo.save(unfinished, "JPEG", quality=95)
    unfinished.rename(target)
