"""Tokenizers of every kind: on disk, in a run, and anything of the same interface."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastbeit.cli import main
from fastbeit.errors import CHECKPOINT_UNUSABLE, TokenizerError
from fastbeit.files import sha256
from fastbeit.tokenizer import authors_vae, codebook, disk, fast, protocol
from fastbeit.tokenizer.authors_vae import CustomizedVAE
from fastbeit.tokenizer.codebook import CodebookArchitecture, CodebookTokenizer
from fastbeit.tokenizer.disk import BUNDLED_NOTE, KINDS, Kind, is_bundled, load_tokenizer, save_tokenizer
from fastbeit.tokenizer.fast import DiscreteVAE
from fastbeit.tokenizer.frozen import Strided, likeliest_words
from fastbeit.tokenizer.protocol import Tokenizer
from fastbeit.train.checkpoint import load_model, load_state, resolve_checkpoint
from helpers.kinds import CHW, make_nets, random_images
from helpers.tiny import make_photos, make_tokenizer, write_config

STRIDES = {"dalle": 8, "customized": 4, "codebook": 16}
TOKENIZERS = {"dalle": DiscreteVAE, "customized": CustomizedVAE, "codebook": CodebookTokenizer}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_comes_back_from_disk_as_it_was(tmp_path, kind):
    nets = make_nets(kind)
    save_tokenizer(tmp_path / "one", *nets, origin={"command": "a test"})
    save_tokenizer(tmp_path / "bundled" / "small.safetensors", *nets)
    card = json.loads((tmp_path / "one/dvae.json").read_text())
    assert card["kind"] == kind and card["origin"] == {"command": "a test"}
    assert sorted(path.name for path in (tmp_path / "bundled").iterdir()) == ["small.json", "small.safetensors"]

    loaded = load_tokenizer(tmp_path / "one")
    direct = TOKENIZERS[kind](nets[0], lambda: nets[1], "")
    assert type(loaded) is TOKENIZERS[kind] and loaded.vocab_size == 24
    assert loaded.fingerprint == sha256(tmp_path / "one/dvae.safetensors")
    assert loaded.fingerprint == load_tokenizer(tmp_path / "bundled/small.safetensors").fingerprint
    images = random_images(2, *loaded.view_size((2, 3)))
    ids = direct.encode(images)
    assert loaded.view_size((2, 3)) == (2 * STRIDES[kind], 3 * STRIDES[kind]) and len(ids.unique()) > 1
    assert torch.equal(loaded.encode(images), ids)
    assert torch.equal(loaded.decode(ids, (2, 3)), direct.decode(ids, (2, 3)))


@pytest.mark.parametrize(
    "kind, module", [("customized", authors_vae), ("codebook", codebook)], ids=["customized", "codebook"]
)
def test_an_image_has_the_same_tokens_in_any_batch(tmp_path, kind, module, monkeypatch):
    save_tokenizer(tmp_path, *make_nets(kind))
    tokenizer, num_rows = load_tokenizer(tmp_path), []
    images = random_images(5, *tokenizer.view_size((2, 3)))
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])

    def counted(features, *head):
        num_rows.append(len(features))
        return likeliest_words(features, *head)

    monkeypatch.setattr(module, "likeliest_words", counted)
    monkeypatch.setitem(fast.TOGETHER, "cpu", 2)
    assert torch.equal(tokenizer.encode(images), alone) and num_rows == [2 * 6] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input_is_named_by_every_kind(tmp_path, kind):
    save_tokenizer(tmp_path, *make_nets(kind))
    tokenizer, stride = load_tokenizer(tmp_path), STRIDES[kind]
    with pytest.raises(ValueError, match=f"multiples of {stride}; got {stride + 1}x{stride}"):
        tokenizer.encode(random_images(1, stride + 1, stride))
    with pytest.raises(ValueError, match="uint8.*float32"):
        tokenizer.encode(random_images(1, stride, stride).float())
    with pytest.raises(ValueError, match="6 tokens do not fill a 2x2 grid"):
        tokenizer.decode(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="0 to 23; got 24 to 24"):
        tokenizer.decode(torch.full((1, 4), 24))


def edit_card(path: Path, **changes) -> None:
    card = {**json.loads((path / "dvae.json").read_text()), **changes}
    (path / "dvae.json").write_text(json.dumps({key: value for key, value in card.items() if value is not None}))


def edit_tensors(path: Path, change) -> None:
    """And the hash in the card."""
    tensors = load_file(path / "dvae.safetensors")
    change(tensors)
    save_file(tensors, path / "dvae.safetensors")
    edit_card(path, sha256=sha256(path / "dvae.safetensors"))


def test_a_card_without_a_kind_is_that_of_a_dalle_dvae(tmp_path):
    save_tokenizer(tmp_path, *make_nets("dalle"))
    edit_card(tmp_path, kind=None)
    assert "kind" not in (tmp_path / "dvae.json").read_text()
    assert isinstance(load_tokenizer(tmp_path), DiscreteVAE)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_on_disk_is_float32_in_use(tmp_path, kind):
    encoder, decoder = make_nets(kind)
    save_tokenizer(tmp_path / "half", encoder.half(), decoder.half())
    # rounded to half precision, then written as float32: the same numbers
    save_tokenizer(tmp_path / "full", encoder.float(), decoder.float())
    half, full = load_tokenizer(tmp_path / "half"), load_tokenizer(tmp_path / "full")
    assert (tmp_path / "half/dvae.safetensors").stat().st_size < 0.7 * (
        tmp_path / "full/dvae.safetensors"
    ).stat().st_size
    images = random_images(1, *half.view_size((2, 2)))
    ids = half.encode(images)
    assert torch.equal(ids, full.encode(images)) and torch.equal(half.decode(ids), full.decode(ids))
    assert half.fingerprint != full.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_without_a_decoder_says_so_when_one_is_wanted(tmp_path, kind):
    save_tokenizer(tmp_path, make_nets(kind)[0])
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(random_images(1, *tokenizer.view_size((2, 2))))
    with pytest.raises(TokenizerError, match="without a decoder.*import the decoder too") as err:
        tokenizer.decode(ids)
    assert err.value.exit_code == CHECKPOINT_UNUSABLE


DAMAGE = {
    "kind": ("customized", lambda p: edit_card(p, kind="vqgan"), "kind wants one of dalle, .*found 'vqgan'"),
    "another kind": ("customized", lambda p: edit_card(p, kind="dalle"), r"architecture: unknown key 'num_layers'"),
    "negative": (
        "codebook",
        lambda p: edit_card(p, architecture={"vocab_size": 24, "patch_size": -1, "order": "chw"}),
        "architecture: patch_size: wanted ",
    ),
    "no order": (
        "codebook",
        lambda p: edit_card(p, architecture={"vocab_size": 24, "patch_size": 16}),
        "architecture: order is not there",
    ),
    "another size": (
        "codebook",
        lambda p: edit_card(p, architecture={"vocab_size": 24, "patch_size": 8, "order": "chw", "projected_dim": 9}),
        r"projection.weight wants \[9, 192\], found \[9, 768\]",
    ),
    "no codebook": ("codebook", lambda p: edit_tensors(p, lambda t: t.pop("codebook")), r"codebook wants \[24, 9\]"),
    "no head": (
        "customized",
        lambda p: edit_tensors(p, lambda t: t.pop("encoder.4.bias")),
        r"encoder.4.bias wants \[24\], found nothing",
    ),
    "half a decoder": (
        "customized",
        lambda p: edit_tensors(p, lambda t: t.pop("codebook.weight")),
        r"codebook.weight wants \[24, 6\], found nothing",
    ),
    "left over": (
        "dalle",
        lambda p: edit_tensors(p, lambda t: t.update({"optimizer": torch.zeros(1)})),
        r"optimizer wants not to be there, found \[1\]",
    ),
    "bit flip": (
        "codebook",
        lambda p: (p / "dvae.safetensors").write_bytes((p / "dvae.safetensors").read_bytes()[:-1] + b"\x7f"),
        "damaged or replaced",
    ),
}


@pytest.mark.parametrize("kind, damage, message", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_tokenizer_of_any_kind_is_refused(tmp_path, kind, damage, message):
    save_tokenizer(tmp_path, *make_nets(kind))
    damage(tmp_path)
    with pytest.raises(TokenizerError, match=message) as err:
        load_tokenizer(tmp_path)
    assert err.value.exit_code == CHECKPOINT_UNUSABLE and "\n" not in str(err.value)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parts")
    assert main(["index", str(make_photos(folder / "photos")), "-o", str(folder / "images.idx")]) == 0
    return {"config": str(write_config(folder / "tiny.yaml")), "data.index": str(folder / "images.idx")}


def pretrain(parts: dict[str, str], out: Path, tokenizer: Path | str, **settings: object) -> int:
    values = {**parts, "out": out, "tokenizer.path": tokenizer, "optim.steps": 3, **settings}
    return main(["pretrain", values.pop("config"), *(f"{key}={value}" for key, value in values.items())])


def assert_learnt_from(out: Path, fingerprint: str, vocab_size: int) -> None:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "event" not in line]
    # the head starts near 0, so that all words are as likely
    assert len(losses) == 3 and losses[0] == pytest.approx(np.log(vocab_size), abs=0.3)
    checkpoint = resolve_checkpoint(out)
    assert load_state(checkpoint)["tokenizer"] == fingerprint
    assert load_model(checkpoint)["lm_head.weight"].shape[0] == vocab_size


# 4 and 16 pixels a token, of patches of 8 pixels: the token view has 16 and 64 pixels a side, the patch view 32
@pytest.mark.parametrize("kind", ["customized", "codebook"])
def test_a_run_learns_the_words_of_any_kind(tmp_path, parts, kind):
    save_tokenizer(tmp_path / "tokenizer", *make_nets(kind))
    assert pretrain(parts, tmp_path / "run", tmp_path / "tokenizer", **{"data.val_index": parts["data.index"]}) == 0
    assert_learnt_from(tmp_path / "run", sha256(tmp_path / "tokenizer/dvae.safetensors"), vocab_size=24)


def test_a_damaged_tokenizer_ends_a_run_with_one_line(tmp_path, parts, capsys):
    save_tokenizer(tmp_path / "tokenizer", *make_nets("codebook"))
    edit_card(tmp_path / "tokenizer", kind="vqgan")
    assert pretrain(parts, tmp_path / "run", tmp_path / "tokenizer") == CHECKPOINT_UNUSABLE
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "kind wants one of dalle, customized, codebook; found 'vqgan'" in said


def test_a_run_without_a_tokenizer_takes_the_one_in_the_box_and_says_so(tmp_path, parts, capsys, monkeypatch):
    bundled = make_tokenizer(tmp_path / "bundled", seed=0) / "dvae.safetensors"
    monkeypatch.setattr(disk, "BUNDLED", bundled.rename(tmp_path / "bundled/small.safetensors"))
    (tmp_path / "bundled/dvae.json").rename(tmp_path / "bundled/small.json")
    fingerprint = load_tokenizer("").fingerprint
    assert (
        fingerprint == load_tokenizer(disk.BUNDLED).fingerprint and is_bundled(fingerprint) and not is_bundled("0" * 64)
    )

    assert pretrain(parts, tmp_path / "run", "") == 0
    assert_learnt_from(tmp_path / "run", fingerprint, vocab_size=32)
    assert BUNDLED_NOTE in capsys.readouterr().err and "fastbeit tokenizer fetch" in BUNDLED_NOTE
    assert pretrain(parts, tmp_path / "other", make_tokenizer(tmp_path / "mine", seed=1)) == 0
    assert BUNDLED_NOTE not in capsys.readouterr().err


def test_the_example_of_the_interface_is_right():
    result = doctest.testmod(protocol)
    assert result.attempted > 5 and not result.failed


class Level(nn.Module):
    """The net of a tokenizer of someone else's: a threshold."""

    def __init__(self, arch: CodebookArchitecture):
        super().__init__()
        self.arch = arch
        self.threshold = nn.Parameter(torch.tensor(100.0))


class NoNet(nn.Module):
    """The pictures of two words need no weights."""

    def __init__(self, arch: CodebookArchitecture):
        super().__init__()


class LightOrDark(Strided):
    def __init__(self, encoder: Level, read_decoder, fingerprint: str, dtype: torch.dtype):
        self.vocab_size, self.stride, self.fingerprint = 2, encoder.arch.patch_size, fingerprint
        self.device, self.threshold = encoder.threshold.device, encoder.threshold.detach()

    def encode(self, images):
        light = self.checked_images(images).float().mean(3, keepdim=True).movedim(3, 1)
        return (nn.functional.avg_pool2d(light, self.stride) > self.threshold).long().flatten(1)

    def decode(self, ids, grid=None):
        light = self.checked_ids(ids, grid).byte() * 255
        return light.repeat_interleave(self.stride, 1).repeat_interleave(self.stride, 2)[..., None].repeat(1, 1, 1, 3)


def test_a_run_learns_the_words_of_someone_elses_tokenizer(tmp_path, parts, monkeypatch):
    """A line in KINDS is all that it takes."""
    monkeypatch.setitem(KINDS, "level", Kind(CodebookArchitecture, Level, NoNet, LightOrDark))
    save_tokenizer(tmp_path / "level", Level(CodebookArchitecture(vocab_size=2, patch_size=4, order=CHW)))
    tokenizer: Tokenizer = load_tokenizer(tmp_path / "level")
    assert tokenizer.encode(tokenizer.decode(torch.tensor([[0, 1, 1, 0]]))).tolist() == [[0, 1, 1, 0]]
    assert pretrain(parts, tmp_path / "run", tmp_path / "level") == 0
    assert_learnt_from(tmp_path / "run", tokenizer.fingerprint, vocab_size=2)
