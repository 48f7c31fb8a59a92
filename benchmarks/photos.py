"""Images for a benchmark that trains or decodes: photos of the demo's packages, or files made for the occasion."""

from pathlib import Path

from PIL import Image

from benchmarks.step.shards import write_shards
from fastbeit.data.demo_photos import gather_photos
from fastbeit.data.index.scan import build_index


def make_index(kind: str, folder: Path, num_synthetic: int) -> Path:
    """The index of images in a new `folder`.

    Args:
        kind: "synthetic": soft colours with grain, 500 x 375, in shards. "photos": the demo's, and their quarters.

    Raises:
        RunError: the packages that carry the photos are not installed.
    """
    folder.mkdir(parents=True)
    if kind == "synthetic":
        write_shards(folder / "images", num_synthetic)
    else:
        gather_photos(folder / "gathered", None)
        (folder / "images").mkdir()
        for path in sorted((folder / "gathered" / "train").iterdir()):
            photo = Image.open(path)
            w, h = photo.width // 2, photo.height // 2
            boxes = [(0, 0, 2 * w, 2 * h), *((x, y, x + w, y + h) for x in (0, w) for y in (0, h))]
            for number, box in enumerate(boxes):
                photo.crop(box).save(folder / "images" / f"{path.stem}-{number}.jpg", quality=95)
    build_index(folder / "images", folder / "images.idx", progress=False)
    return folder / "images.idx"
