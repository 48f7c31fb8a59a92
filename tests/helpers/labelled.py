"""Small images with classes that can be told from their looks."""

from pathlib import Path

from PIL import Image

from helpers.photos import SKIMAGE

CLASSES = {"cat": "chelsea.png", "coffee": "coffee.png", "rocket": "rocket.jpg", "woman": "astronaut.png"}


def write_classes(folder: Path, images: range, classes: dict[str, str] = CLASSES, **numbers: range) -> Path:
    """Crops of one photo a class, each another; those of two ranges do not overlap in number.

    Args:
        images: which crops of each class; `numbers` says it of one class.
    """
    for name, file in classes.items():
        photo = Image.open(SKIMAGE / file).convert("RGB").resize((160, 120))
        (folder / name).mkdir(parents=True)
        for i in numbers.get(name, images):
            left, top = 13 * i % 80, 7 * i % 60
            photo.crop((left, top, left + 80, top + 60)).save(folder / name / f"{i:02}.png")
    return folder
