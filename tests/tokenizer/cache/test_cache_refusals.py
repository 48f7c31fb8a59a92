"""A cache of other tokens than a run wants, or a damaged one, is refused with what differs."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.errors import CacheError, ConfigError, RunError
from fastbeit.jobs.tokenize import tokenize
from fastbeit.tokenizer.cache.reader import make_recipe
from fastbeit.tokenizer.disk import load_tokenizer
from helpers.caches import COMMAND, configured, edit, files, make
from helpers.tiny import make_photos, make_tokenizer

DIFFERENT = {
    "seed": ({"seed": 1}, "seed is 0 there, 1 here"),
    "flip": ({"data.flip": 0}, "data.flip is 0.5 there, 0.0 here"),
    "jitter": ({"data.jitter": 0.3}, "data.jitter is 0.4 there, 0.3 here"),
    "jitter on": ({"data.jitter_on": "crop"}, "data.jitter_on is full_image there, crop here"),
    "size": ({"data.image_size": 64, "model.patch_size": 16}, r"data.image_size is \(32, 32\) there, \(64, 64\) here"),
    "scale": ({"data.crop_scale": "[0.2, 1]"}, r"data.crop_scale is \(0.08, 1.0\) there, \(0.2, 1.0\) here"),
    "ratio": ({"data.crop_ratio": "[0.5, 2]"}, r"data.crop_ratio is \(0.75, 1.33.*\) there, \(0.5, 2.0\) here"),
    "pipeline": ({"data.pipeline": "pillow"}, "data.pipeline is torch there, pillow here"),
    "grid": ({"data.image_size": "[32, 48]"}, r"grid of patches is \(4, 4\) there, \(4, 6\) here"),
    "more views": ({"data.num_crops": 4}, "data.num_crops is 3 there, 4 here"),
    "two": ({"seed": 1, "data.flip": 0}, "seed is 0 there, 1 here; data.flip is 0.5 there, 0.0 here"),
}


@pytest.mark.parametrize("job", ["pretrain", "tokenize"])
@pytest.mark.parametrize("overrides, message", DIFFERENT.values(), ids=list(DIFFERENT))
def test_a_cache_of_another_recipe_is_refused(train, parts, tokens, tmp_path, job, overrides, message):
    before = files(tokens)
    with pytest.raises(RunError, match=message) as caught:
        train("run", data__tokens=tokens, **overrides) if job == "pretrain" else make(parts, tokens, **overrides)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists() and files(tokens) == before


@pytest.mark.parametrize("job", ["pretrain", "tokenize"])
def test_a_cache_of_other_images_or_another_tokenizer_is_refused(train, parts, tokens, tmp_path, job):
    build_index(make_photos(tmp_path / "photos", 11), tmp_path / "images.idx", progress=False)
    ours, theirs = (open_index(Path(path)).fingerprint for path in (parts["data.index"], tmp_path / "images.idx"))
    mine = load_tokenizer(parts["tokenizer.path"]).fingerprint
    other = load_tokenizer(make_tokenizer(tmp_path / "dvae", seed=1)).fingerprint
    for overrides, values in [
        ({"data.index": tmp_path / "images.idx"}, [ours[:16], theirs[:16], "num images is 12 there, 11 here"]),
        ({"tokenizer.path": tmp_path / "dvae"}, [mine[:16], other[:16]]),
    ]:
        with pytest.raises(RunError) as caught:
            train("run", data__tokens=tokens, **overrides) if job == "pretrain" else make(parts, tokens, **overrides)
        assert caught.value.exit_code == 2 and all(value in str(caught.value) for value in values)


def test_views_that_come_ever_new_are_refused_with_the_number_to_set(train, tokens):
    with pytest.raises(RunError, match=r"holds tokens of 3 crops of each image, .*set data\.num_crops=3") as caught:
        train("run", data__tokens=tokens, data__num_crops=0)
    assert caught.value.exit_code == 2


def test_pixels_take_no_tokens(parts, tokens):
    with pytest.raises(ConfigError, match="objective=pixels predicts none"):
        configured(parts, data__tokens=tokens, objective="pixels")


DAMAGE = {
    "cut short": (lambda f: os.truncate(f / "view-001.npy", 500), "view-001.npy' wants 512 bytes, has 500"),
    "flipped header": (
        lambda f: edit(f / "view-002.npy", 1, b"M"),
        r"view-002.npy' wants to begin with .*NUMPY.*MUMPY",
    ),
    "another shape": (
        lambda f: np.save(f / "view-000.npy", np.zeros((24, 8), np.uint16)),
        r"\(12, 16\).*found.*\(24, 8\)",
    ),
    "missing view": (lambda f: (f / "view-001.npy").unlink(), "view-001.npy' cannot be read: No such file"),
    "no card": (lambda f: (f / "tokens.json").write_text("<html>"), "tokens.json': the whole: wanted JSON"),
    "former version": (
        lambda f: (f / "tokens.json").write_text((f / "tokens.json").read_text().replace('"format": 3', '"format": 2')),
        "tokens.json' has format 2, wanted 3; make the tokens again",
    ),
    "no version": (
        lambda f: (f / "tokens.json").write_text((f / "tokens.json").read_text().replace('"format"', '"formed"')),
        "tokens.json': format is not there",
    ),
    "flipped card": (
        lambda f: (f / "tokens.json").write_text((f / "tokens.json").read_text().replace('"seed": 0', '"seed": 4')),
        "tokens.json' is damaged: it differs from its own checksum",
    ),
    "nulls": (lambda f: (f / "tokens.json").write_bytes(bytes(900)), "tokens.json': the whole: wanted JSON"),
    "deep card": (lambda f: (f / "tokens.json").write_bytes(b"[" * 200_000), "tokens.json': the whole: wanted JSON"),
    "flipped token": (
        lambda f: edit(f / "view-001.npy", -2, b"\x01"),
        "view-001.npy' is damaged: the MiB of tokens from",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_cache_is_refused(train, parts, tokens, tmp_path, damage, message):
    copied = Path(shutil.copytree(tokens, tmp_path / "tokens"))
    damage(copied)
    for use in (lambda: train("run", data__tokens=copied), lambda: make(parts, copied)):
        with pytest.raises(CacheError, match=message) as caught:
            use()
        assert caught.value.exit_code == 78


def test_tokens_that_are_not_there_are_said(train, tmp_path):
    with pytest.raises(CacheError, match="nowhere' does not exist; make them: fastbeit tokenize CONFIG") as caught:
        train("run", data__tokens=tmp_path / "nowhere")
    assert caught.value.exit_code == 66


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"data.num_crops": 0}, "add data.num_crops=K"),
        ({"objective": "pixels", "data.tokens": ""}, "objective=pixels predicts no tokens"),
        ({"data.index": ""}, "data.index is not set"),
    ],
    ids=str,
)
def test_what_cannot_be_tokenized_says_so_first(parts, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        tokenize(configured(parts, **overrides), COMMAND)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_two_bytes_cannot_hold_is_refused(parts):
    tokenizer = load_tokenizer(parts["tokenizer.path"])
    for words, is_refused in ((65535, False), (65536, True)):
        tokenizer.vocab_size = words  # pyright: ignore[reportAttributeAccessIssue]
        config, index = configured(parts), open_index(Path(parts["data.index"]))
        if is_refused:
            with pytest.raises(RunError, match="at most 65535 words; .* has 65536"):
                make_recipe(config, index, tokenizer)
        else:
            assert make_recipe(config, index, tokenizer).vocab_size == words
