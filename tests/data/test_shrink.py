"""One image as it goes into a shard."""

import io

import numpy as np
import pytest
from PIL import Image

from fastbeit.data.decode import decode
from fastbeit.data.shrink import shrink
from fastbeit.errors import BadImage
from helpers import photos


def test_the_shorter_side_is_made_as_long_as_wanted_and_the_longer_follows():
    for size in ((300, 500), (500, 300), (301, 301)):
        data = photos.encoded(photos.small_photo(*size))
        made = shrink(data, size, 200, 90)
        assert min(made.size) == 200 and not made.is_copy
        assert max(made.size) == round(200 * max(size) / min(size))
        with Image.open(io.BytesIO(made.data)) as image:
            assert (image.height, image.width) == made.size and image.format == "JPEG"
    # a line keeps at least its pixel
    assert shrink(photos.encoded(photos.small_photo(3, 500), "PNG"), (3, 500), 1, 90).size == (1, 167)


@pytest.mark.parametrize("name", photos.odd_files())
def test_it_is_upright_and_white_as_training_decodes_it(name):
    data, _ = photos.odd_files()[name]
    size = photos.odd_files()[name][1].shape[:2]
    made = shrink(data, size, 512, 100)
    is_jpeg = data.startswith(b"\xff\xd8\xff")
    assert made.is_copy == is_jpeg and (made.data == data) == is_jpeg and made.size == size
    if "bilevel" not in name and "rgba" not in name:
        # half of the chroma is gone; dithering has much of it
        assert np.abs(decode(made.data, size).astype(int) - decode(data, size)).mean() < 3
    smaller = shrink(data, size, max(1, min(size) // 2), 100)
    with Image.open(io.BytesIO(smaller.data)) as image:
        assert (image.height, image.width) == smaller.size and 0x0112 not in image.getexif()
        box = Image.fromarray(decode(data, size)).resize((image.width, image.height), Image.Resampling.LANCZOS)
        if min(image.size) > 8 and "bilevel" not in name and "rgba" not in name:
            assert np.abs(np.asarray(image, int) - np.asarray(box)).mean() < 4


def test_quality_is_respected():
    data = photos.CHINA.read_bytes()
    sizes = [len(shrink(data, (427, 640), 200, quality).data) for quality in (50, 75, 90, 100)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("max_side", [100, 5000])
def test_what_is_bad_is_bad_here_too(max_side):
    with pytest.raises(BadImage, match="corrupt"):
        shrink(photos.mid_corrupt_jpeg(), (427, 640), max_side, 90)
