"""A cache of tokens: what is in it, training with it, what is told of it."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbeit.cli import main
from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import open_index
from fastbeit.data.index.scan import build_index
from fastbeit.data.loader import make_loader, make_token_loader
from fastbeit.errors import CacheError, DataError, RunError
from fastbeit.tokenizer.cache.info import describe, take_census
from fastbeit.tokenizer.cache.reader import npy_header, open_cache, read_journals
from fastbeit.tokenizer.disk import load_tokenizer
from fastbeit.train.checkpoint import load_model, resolve_checkpoint
from helpers import photos
from helpers.caches import BAD_IMAGE, NUM_IMAGES, VIEWS, configured, edit, facts, files, make
from helpers.tiny import make_photos, make_tokenizer

# ---- what is in it


def test_a_view_is_a_plain_numpy_file(parts, tokens):
    for view in range(VIEWS):
        values = np.load(tokens / f"view-{view:03}.npy", mmap_mode="r")
        assert values.dtype == np.uint16 and values.shape == (NUM_IMAGES, 16)
        assert (values[BAD_IMAGE] == 65535).all()
        assert np.delete(values, BAD_IMAGE, 0).max() < 32
    names = {"tokens.json", "bad_samples.jsonl", *(f"view-{view:03}.npy" for view in range(VIEWS))}
    assert set(files(tokens)) == names


def test_an_earlier_card_that_does_not_name_the_tokenizers_path_is_read(tokens, tmp_path):
    folder = shutil.copytree(tokens, tmp_path / "tokens")
    card = json.loads((folder / "tokens.json").read_text())
    assert card.pop("tokenizer_path")
    text = json.dumps({**card, "checksum": ""}, separators=(",", ":"), ensure_ascii=False)
    card["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "tokens.json").write_text(json.dumps(card))
    assert open_cache(folder).card.tokenizer_path == ""


def test_reading_gives_the_tokens_of_the_crops_that_training_draws(parts, tokens):
    cache, config = open_cache(tokens), configured(parts, data__pipeline="torch")
    tokenizer = load_tokenizer(parts["tokenizer.path"])
    loader = make_loader(
        config.data,
        open_index(Path(parts["data.index"])),
        token_size=(32, 32),
        batch_size=8,
        seed=config.seed,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=8,
    )
    seen = set()
    for batch in loader:
        assert batch.token_images is not None
        read = cache.read(batch.sample, batch.epoch % VIEWS)
        assert read.dtype == torch.int64 and torch.equal(read, tokenizer.encode(batch.token_images))
        seen |= set(zip(batch.sample.tolist(), batch.epoch.tolist(), strict=True))
    # five epochs and a part: each view of each image that is good, some twice
    assert {(i, epoch % VIEWS) for i, epoch in seen} == {
        (i, view) for i in range(NUM_IMAGES) for view in range(VIEWS) if i != BAD_IMAGE
    }


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("pipeline", ["torch", "pillow", "dali"])
def test_token_views_are_those_of_training(tmp_path, pipeline, num_workers):
    """Bit by bit; photos of many sizes, one that is to be turned, one that is bad."""
    folder = photos.copy_photos(tmp_path / "photos")
    (folder / "turned.jpg").write_bytes(photos.turned(photos.small_photo(), 6))
    (folder / "vanishes.jpg").write_bytes(photos.encoded(photos.small_photo()))
    build_index(folder, tmp_path / "images.idx", progress=False)
    (folder / "vanishes.jpg").unlink()
    index, views = open_index(tmp_path / "images.idx"), 2
    data = DataConfig.model_validate(
        {"num_crops": views, "pipeline": pipeline, "num_workers": num_workers, "tail": "wrap"}
    )
    batches = make_loader(
        data,
        index,
        token_size=(32, 48),
        batch_size=len(index),
        seed=5,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=2 * views,
    )
    made = list(make_token_loader(data, index, token_size=(32, 48), seed=5, rows=[range(len(index))], together=4))
    ours = torch.cat([part.images for part in made])
    assert [i for part in made for i, _ in part.bad] == [len(index) - 1]
    assert [len(part.rows) for part in made] == [4, 4, 1] and not ours[-1].any()
    for batch in batches:
        assert batch.token_images is not None
        for image, i, epoch in zip(batch.token_images, batch.sample, batch.epoch, strict=True):
            assert torch.equal(image, ours[i, epoch % views])


def test_bad_images_are_marked_and_named(tokens):
    cache = open_cache(tokens)
    assert cache.card.num_bad == 1
    (line,) = (tokens / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == BAD_IMAGE and "03.jpg: empty file" in line
    with pytest.raises(CacheError, match=r"no tokens of image 3, .*03\.jpg: empty file.*make the tokens again"):
        cache.read(torch.tensor([0, BAD_IMAGE]), torch.tensor([0, 1]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_images_end_the_job(parts, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr("fastbeit.train.bad_samples.bad_limit", lambda num_images: 0)
    with pytest.raises(DataError, match=r"1 bad images, more than the limit of 0 .*/bad_samples\.jsonl") as caught:
        make(parts, tmp_path / "tokens", data__num_workers=num_workers)
    assert caught.value.exit_code == 65


def test_when_all_images_are_bad_there_is_no_cache(parts, tmp_path):
    folder = make_photos(tmp_path / "photos", 2)
    build_index(folder, tmp_path / "images.idx", progress=False)
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 2 images is valid") as caught:
        make({**parts, "data.index": tmp_path / "images.idx"}, tmp_path / "tokens")
    assert caught.value.exit_code == 66
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="is gone, or not mounted"):
        make({**parts, "data.index": tmp_path / "images.idx"}, tmp_path / "others")


# ---- training with it


def test_each_loss_is_that_of_tokens_made_on_the_fly(train, tokens, tmp_path, monkeypatch):
    """50 steps of 8 in epochs of 12, over a bad image: to the bit, without the tokenizer."""
    settings = {"optim__steps": 50, "log__save_every": 0}
    fly = train("fly", **settings)
    assert len(fly) == 50 and fly[-1]["bad_samples"] == 1
    monkeypatch.setattr(
        "fastbeit.tokenizer.source.load_run_tokenizer", lambda *_: pytest.fail("no tokenizer is wanted")
    )
    for num_workers in (0, 2):
        out = f"cached-{num_workers}"
        cached = train(out, **settings, **{"tokenizer.path": ""}, data__tokens=tokens, data__num_workers=num_workers)
        assert facts(cached) == facts(fly)
        weights = (load_model(resolve_checkpoint(tmp_path / name)) for name in (out, "fly"))
        torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_fewer_views_than_the_cache_has_are_its_first(train, tokens):
    fly = train("fly", data__num_crops=2)
    assert facts(train("cached", data__num_crops=2, data__tokens=tokens)) == facts(fly) != facts(train("three"))


@pytest.mark.parametrize("first_with_cache", [False, True])
def test_a_run_goes_on_with_a_cache_or_without(train, tokens, tmp_path, first_with_cache):
    whole = train("whole")
    having = {"data__tokens": tokens}, {}
    first, second = having if first_with_cache else having[::-1]
    train("parts", **first, log__save_every=3)
    (tmp_path / "parts/checkpoints/step-000006").rename(tmp_path / "gone")
    log = train("parts", **second, log__save_every=3)
    assert [line["changes"].keys() for line in log if line.get("event") == "resume"] == [{"data.tokens"}]
    assert facts([line for line in log if line.get("event") != "resume"]) == facts(whole)


def test_validation_asks_the_tokenizer(train, parts, tokens):
    having = {"data.val_index": parts["data.index"], "log.val_every": 3, "optim.steps": 4}
    fly = train("fly", **having)
    assert [line["step"] for line in fly if line.get("event") == "validation"] == [3, 4]
    assert facts(train("cached", data__tokens=tokens, **having)) == facts(fly)


def test_validation_by_another_tokenizer_is_refused_before_the_run_begins(train, parts, tokens, tmp_path, monkeypatch):
    """With no tokenizer named, validation would ask the bundled one."""
    bundled = load_tokenizer(make_tokenizer(tmp_path / "bundled", seed=1))
    monkeypatch.setattr("fastbeit.tokenizer.source.load_tokenizer", lambda path, *_: bundled)
    settings = {"data__tokens": tokens, "tokenizer.path": "", "optim.steps": 1}
    with pytest.raises(RunError, match=r"tokenizer.path \(empty: the bundled one\) is .*data.val_index") as caught:
        train("run", **settings, **{"data.val_index": parts["data.index"]})
    values = [load_tokenizer(parts["tokenizer.path"]).fingerprint[:16], bundled.fingerprint[:16]]
    assert caught.value.exit_code == 2 and all(value in str(caught.value) for value in values)
    assert not (tmp_path / "run").exists()
    train("run", **settings)


# ---- what is told of it


def test_info(tokens, capsys):
    assert main(["tokenize", "--info", str(tokens)]) == 0
    text = capsys.readouterr().out
    rows = np.concatenate([np.load(tokens / f"view-{view:03}.npy") for view in range(VIEWS)])
    share = np.unique(rows[rows[:, 0] != 65535], return_counts=True)[1] / (16 * VIEWS * (NUM_IMAGES - 1))
    entropy = -(share * np.log(share)).sum()
    census = take_census(open_cache(tokens))
    # two orders of a float64 sum
    assert census.entropy == pytest.approx(entropy, rel=1e-12)
    assert census.num_bad_rows == VIEWS and census.histogram.sum() == 16 * VIEWS * (NUM_IMAGES - 1)
    for shown in (
        f"{entropy:.4f} nats",
        f"perplexity {np.exp(entropy):.1f}",
        f"{len(share)} of 32 in use",
        "12, 1 of them bad",
        "3 an image, 4x4 tokens each; 3 bad",
        "1,152 bytes, 96 an image, 32 a crop",
        f"({share.max():.2%})",
    ):
        assert shown in text


def test_info_finds_what_a_sample_does_not(tokens, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(tokens, tmp_path / "tokens"))
    edit(copied / "view-001.npy", -2, b"\x01")
    monkeypatch.setattr("fastbeit.checksums.SAMPLED_BLOCKS", 0)
    describe(open_cache(tokens))
    with pytest.raises(
        CacheError, match=r"view-001.npy' wants sha256 .*, as tokens.json says; found .*damaged"
    ) as caught:
        describe(open_cache(copied))
    assert caught.value.exit_code == 78


def test_a_sample_of_a_large_cache_is_compared_at_each_start(tokens, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(tokens, tmp_path / "tokens"))
    assert "3 of 3 MiB compared" in str(open_cache(copied).checked)
    edit(copied / "view-001.npy", -2, b"\x01")
    monkeypatch.setattr("fastbeit.checksums.SAMPLED_BLOCKS", 1)
    verdicts = set()
    for _ in range(200):
        try:
            assert "1 of 3 MiB compared" in str(open_cache(copied).checked)
            verdicts.add("passed")
        except CacheError:
            verdicts.add("found")
    # each start draws others: to see one verdict alone has a chance of (2 / 3) ** 200
    assert verdicts == {"passed", "found"}


def test_a_token_that_is_no_word_is_named_before_it_is_used(parts, tokens, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(tokens, tmp_path / "tokens"))
    edit(copied / "view-001.npy", -2, b"\xf0\x70")
    monkeypatch.setattr("fastbeit.checksums.SAMPLED_BLOCKS", 0)
    cache = open_cache(copied)
    assert cache.read(torch.tensor([0, 1]), torch.tensor([1, 1])).max() < cache.vocab_size
    with pytest.raises(
        CacheError, match=rf"view-001.npy' is damaged: image {NUM_IMAGES - 1} has the token 28912"
    ) as caught:
        cache.read(torch.tensor([0, NUM_IMAGES - 1]), torch.tensor([2, 1]))
    assert caught.value.exit_code == 78


def test_no_flip_of_a_bit_passes(tokens, tmp_path):
    copied = Path(shutil.copytree(tokens, tmp_path / "tokens"))
    random = np.random.default_rng(0)
    for name in ("tokens.json", "view-000.npy", "view-002.npy"):
        whole = (copied / name).read_bytes()
        places = random.choice(len(whole), min(len(whole), 300), replace=False).tolist()
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(random.integers(8))
            (copied / name).write_bytes(damaged)
            with pytest.raises(CacheError):
                open_cache(copied)
        (copied / name).write_bytes(whole)
    assert open_cache(copied)


def test_damaged_sidecars_stop_nothing(tokens, tmp_path):
    copied = Path(shutil.copytree(tokens, tmp_path / "tokens"))
    for content in (b"", bytes(99), b"\xff\xfe\n", b"[]\n5\n", b'{"sample": 3}\n', b"[" * 200_000):
        (copied / "bad_samples.jsonl").write_bytes(content)
        with pytest.raises(CacheError, match="could not be read when they were made .not listed"):
            open_cache(copied).read(torch.tensor([BAD_IMAGE]), torch.tensor([0]))
        (copied / "done-000.jsonl").write_bytes(
            content + b'\n{"chunk": 1, "bad": [[3, "x"]], "crc32": [7]}\n{"chunk": 2, "bad": []}\n'
        )
        assert read_journals(copied) == {1: ([(3, "x")], [7])}


def test_the_header_is_numpys(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 3), np.uint16))
    assert (tmp_path / "a.npy").read_bytes().startswith(npy_header(5, 3))


def test_the_command(parts, tokens, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [f"{key}={value}" for key, value in parts.items() if key != "config"]
    command = ["tokenize", parts["config"], *settings, "--data.num_crops", str(VIEWS)]
    for said in ("tokens: tokens\n", "tokens: tokens (were finished before)\n"):
        assert main(command) == 0
        shown = capsys.readouterr()
        assert said in shown.out and "12 images x 3 crops x 16 tokens: 1,536 bytes in 'tokens'; 1 rank" in shown.out
    assert files(tmp_path / "tokens") == files(tokens)
    assert main([*command, "data.num_crops=2"]) == 2
    assert "data.num_crops is 3 there, 2 here" in capsys.readouterr().err


def test_progress_is_said_where_no_terminal_looks_on(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastbeit.jobs.tokenize.SAY_EVERY_S", 0)
    make(parts, tmp_path / "tokens")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert re.fullmatch(r"6/36 img  [\d.]+ img/s  ETA \d\d:\d\d", lines[0]) and lines[-1].startswith("36/36 img")


def test_the_command_says_what_is_missing(capsys):
    assert main(["tokenize"]) == 2
    assert "CONFIG is wanted: a YAML file, or one that comes with fastbeit" in capsys.readouterr().err
