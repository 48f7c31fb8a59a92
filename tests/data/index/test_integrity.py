"""An index that was damaged, and images that are not those that were indexed, are found."""

import numpy as np
import pytest

from fastbeit import checksums
from fastbeit.data.index import tables
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.errors import BadImage, DataError
from fastbeit.jobs.check_index import check_index
from helpers import photos
from helpers.archived import index_of, write_tar, zipped


@pytest.fixture
def path(tmp_path):
    (tmp_path / "data/cat").mkdir(parents=True)
    for number in range(12):
        (tmp_path / f"data/cat/{number}.jpg").write_bytes(photos.encoded(photos.small_photo(20 + number, 30)))
    build_index(tmp_path / "data", tmp_path / "images.idx", progress=False)
    return tmp_path / "images.idx"


def test_no_flip_of_a_bit_passes(path):
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for place in random.choice(len(whole), 500, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="images.idx"):
            open_index(path)
    path.write_bytes(whole)
    assert len(open_index(path)) == 12


def test_of_a_large_index_a_sample_is_compared_and_a_check_compares_all(path, monkeypatch, capsys):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr(checksums, "SAMPLED_BLOCKS", 1)
    verdicts = set()
    for _ in range(400):
        try:
            open_index(path)
            verdicts.add("passed")
        except DataError as err:
            assert "column file_names" in str(err) and err.exit_code == 66
            verdicts.add("found")
    # each start draws others of its columns, of which 13 hold something: one verdict alone has a chance of 1e-14
    assert verdicts == {"passed", "found"}
    monkeypatch.setattr(checksums, "SAMPLED_BLOCKS", 0)
    with pytest.raises(DataError, match="is damaged: its columns, differ from what was written"):
        check_index(path, 0)
    path.write_bytes(whole)
    assert check_index(path, 0) == 0
    assert capsys.readouterr().out.startswith("the index is the one that was written (sha256)\n")


def test_blocks_of_an_array(monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, (3 << 20) + 5, np.uint8)
    sums = checksums.block_sums(data)
    assert len(sums) == 4
    checked = checksums.check_blocks({"a": data}, {"a": sums})
    assert checked.damaged is None and str(checked) == "4 of 4 MiB compared with their checksums"
    data[(2 << 20) + 7] ^= 1
    assert checksums.check_blocks({"a": data}, {"a": sums}).damaged == ("a", 2 << 20)
    data[(2 << 20) + 7] ^= 1
    assert checksums.check_blocks({"a": data}, {"a": sums[:3]}).damaged == ("a", 3 << 20)
    assert checksums.check_blocks({"b": data}, {"a": sums}).damaged == ("b", 0)


def bmp(red: int) -> bytes:
    """Files of one length, whose ends are alike."""
    pixels = np.full((96, 96, 3), 200, np.uint8)
    pixels[40:56] = red
    return photos.encoded(photos.Image.fromarray(pixels), "BMP")


def test_another_photo_of_the_same_length_is_another_index_and_no_image_of_the_old_one(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.bmp").write_bytes(bmp(10))
    index, _, _ = index_of(tmp_path / "data", tmp_path)
    assert index.read_bytes(0) == bmp(10) and len(bmp(10)) == len(bmp(20)) > 20_000
    (tmp_path / "data/a.bmp").write_bytes(bmp(20))
    with pytest.raises(BadImage, match="changed since it was indexed: as many bytes, but others"):
        index.read_bytes(0)
    assert index_of(tmp_path / "data", tmp_path)[0].fingerprint != index.fingerprint


@pytest.mark.parametrize("kind", ["tar", "zip, stored", "zip, deflated", "parquet"])
def test_the_same_of_one_inside_another_file(tmp_path, kind):
    path, images = tmp_path / f"images.{kind[:3]}", [bmp(10), bmp(20)]

    def write(image: bytes) -> None:
        if kind == "parquet":
            pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            table = pa.table({"image": [{"bytes": image, "path": None}]})
            # of one length, so that the file is not told by its own
            parquet.write_table(table, tmp_path / "images.parquet", compression=None, write_statistics=False)
        elif kind == "tar":
            write_tar(path, [("a.bmp", image)])
        else:
            import zipfile

            with zipfile.ZipFile(path, "w", 8 if kind.endswith("deflated") else 0) as archive:
                archive.writestr(zipfile.ZipInfo("a.bmp"), image, 8 if kind.endswith("deflated") else 0)

    path = tmp_path / "images.parquet" if kind == "parquet" else path
    write(images[0])
    index, _, _ = index_of(path, tmp_path)
    assert index.read_bytes(0) == images[0]
    size = path.stat().st_size
    write(images[1])
    # a process remembers the row groups that it has decoded
    tables.ROW_GROUPS.__init__()
    tables._layout.cache_clear()
    assert path.stat().st_size == size
    again, _, _ = index_of(path, tmp_path)
    assert again.fingerprint != index.fingerprint and again.read_bytes(0) == images[1]


def test_a_shard_of_the_same_length_with_other_images(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped(0))
    index, _, _ = index_of(tmp_path / "a.zip", tmp_path)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[int(index.offsets[1]) + 300] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    assert index.read_bytes(0)
    with pytest.raises(BadImage, match="as many bytes, but others"):
        index.read_bytes(1)
