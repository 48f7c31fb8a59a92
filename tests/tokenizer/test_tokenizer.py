"""The dVAE equals OpenAI's package and Hugging Face's port; what is on disk is read strictly."""

import dall_e
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastbeit.config.tokenizer import Architecture
from fastbeit.errors import CANNOT_WRITE, CHECKPOINT_UNUSABLE, DATA_MISSING, RunError
from fastbeit.files import sha256
from fastbeit.tokenizer.disk import TokenizerError, load_tokenizer, save_tokenizer
from fastbeit.tokenizer.dvae import Decoder, Encoder, map_pixels, one_hot, unmap_pixels
from fastbeit.tokenizer.fast import DiscreteVAE
from helpers.dalle import TINY, official_input, random_images, randomise

NARROW = Architecture(n_hid=64, n_init=32, vocab_size=512)  # the narrowest that the dall-e package allows


def saved(path, arch=TINY, seed=0) -> DiscreteVAE:
    encoder, decoder = randomise(Encoder(arch), seed), randomise(Decoder(arch), seed + 1)
    save_tokenizer(path, encoder, decoder)  # pyright: ignore[reportArgumentType]
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, DiscreteVAE)
    return tokenizer


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> DiscreteVAE:
    return saved(tmp_path_factory.mktemp("narrow"), NARROW)


def test_parameter_counts_are_those_of_the_release():
    with torch.device("meta"):
        encoder, decoder = Encoder(Architecture()), Decoder(Architecture())
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in decoder.parameters()) == 43_829_766
    assert len(encoder.state_dict()) == 74


@pytest.mark.parametrize(
    "ours, official, x",
    [
        (Encoder, dall_e.Encoder(n_hid=64, vocab_size=512), torch.rand(2, 3, 32, 48)),
        (Decoder, dall_e.Decoder(n_hid=64, vocab_size=512, n_init=32), torch.rand(2, 512, 3, 4)),
    ],
    ids=["encoder", "decoder"],
)
def test_equals_the_dall_e_package(ours, official, x):
    net = ours(NARROW)
    randomise(official, seed=0)
    assert list(net.state_dict()) == list(official.state_dict())
    net.load_state_dict(official.state_dict())
    # the same convolutions in the same order
    assert torch.equal(net(x), official(x))


def test_equals_the_dall_e_package_at_full_width():
    official = dall_e.Encoder()
    randomise(official, seed=0)
    with torch.device("meta"):
        net = Encoder(Architecture())
    net.load_state_dict(official.state_dict(), assign=True)
    images = random_images(1, 56, 64)
    tokens = DiscreteVAE(net, lambda: pytest.fail("the decoder is not wanted"), "").encode(images)
    with torch.no_grad():
        assert torch.equal(tokens, official(official_input(images)).argmax(1).flatten(1))


def test_equals_hugging_face():
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    theirs = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=64, vocab_size=512))
    randomise(theirs, seed=0)
    names = {".group.": ".", ".path.": ".", ".weight": ".w", ".bias": ".b"}
    weights = theirs.state_dict()
    for old, new in names.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    net = Encoder(NARROW)
    net.load_state_dict(weights)
    x = torch.rand(2, 3, 32, 48)
    assert torch.equal(net(x), theirs(x))


def test_pixels_are_mapped_as_officially():
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(map_pixels(pixels), dall_e.map_pixels(pixels))
    assert torch.equal(unmap_pixels(pixels), dall_e.unmap_pixels(pixels))
    torch.testing.assert_close(unmap_pixels(map_pixels(pixels)), pixels)


def test_tokens_are_the_likeliest_words_row_by_row(narrow):
    images = random_images(2, 32, 48)
    official = dall_e.Encoder(n_hid=64, vocab_size=512)
    randomise(official, seed=0)
    tokens = narrow.encode(images)
    assert tokens.dtype == torch.int64 and narrow.grid((32, 48)) == (4, 6)
    with torch.no_grad():
        assert torch.equal(tokens.unflatten(1, (4, 6)), official(official_input(images)).argmax(1))


def test_tokens_are_decoded_as_officially(narrow):
    official = dall_e.Decoder(n_hid=64, vocab_size=512, n_init=32)
    official.load_state_dict(narrow._decoder.state_dict())
    ids = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        words = nn.functional.one_hot(ids.view(2, 2, 4), 512).permute(0, 3, 1, 2).float()
        pixels = dall_e.unmap_pixels(torch.sigmoid(official(words)[:, :3])).permute(0, 2, 3, 1)
    images = narrow.decode(ids, grid=(2, 4))
    assert images.shape == (2, 16, 32, 3) and images.dtype == torch.uint8
    # half a step of rounding, and the noise of float32
    assert (images.float() - 255 * pixels).abs().max() <= 0.5 + 1e-3
    assert torch.equal(narrow.decode(ids[:, :4]), narrow.decode(ids[:, :4], grid=(2, 2)))


def test_one_hot():
    ids = torch.tensor([[[0, 3]]])
    assert one_hot(ids, 4)[0, :, 0].T.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("group_count, stride", [(2, 2), (4, 8), (5, 16)])
def test_stride_is_that_of_the_pools_between_groups(tmp_path, group_count, stride):
    tokenizer = saved(tmp_path, Architecture(n_hid=4, n_init=4, vocab_size=8, group_count=group_count))
    assert tokenizer.stride == stride and tokenizer.view_size((2, 3)) == (2 * stride, 3 * stride)
    tokens = tokenizer.encode(random_images(1, 2 * stride, 3 * stride))
    assert tokens.shape == (1, 6) and tokenizer.decode(tokens, (2, 3)).shape == (1, 2 * stride, 3 * stride, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: t.encode(random_images(1, 30, 48)), r"multiples of 8; got 30x48; try \[32, 48\]"),
        (lambda t: t.encode(random_images(1, 0, 48)), "multiples of 8; got 0x48"),
        (lambda t: t.encode(random_images(1, 32, 32).float()), "uint8.*float32"),
        (lambda t: t.encode(random_images(1, 32, 32).permute(0, 3, 1, 2)), r"uint8 \[B, h, w, 3\].*\[1, 3, 32, 32\]"),
        (lambda t: t.decode(torch.zeros(1, 6, dtype=torch.int64)), "6 tokens do not fill a 2x2 grid"),
        (lambda t: t.decode(torch.full((1, 4), 32)), "0 to 31; got 32 to 32"),
        (lambda t: t.decode(torch.full((1, 4), -100)), "got -100"),
    ],
)
def test_wrong_input_is_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(saved(tmp_path))


def test_the_decoder_is_read_when_first_wanted(tmp_path):
    tokenizer = saved(tmp_path)
    tokens = tokenizer.encode(random_images(1, 16, 16))
    assert "_decoder" not in vars(tokenizer)
    tokenizer.decode(tokens)
    assert "_decoder" in vars(tokenizer)


def test_a_tokenizer_without_decoder_encodes(tmp_path):
    save_tokenizer(tmp_path, Encoder(TINY))
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.encode(random_images(1, 16, 16))
    with pytest.raises(TokenizerError, match="imported or saved without a decoder"):
        tokenizer.decode(tokens)


def test_a_tokenizer_is_frozen(tmp_path):
    tokenizer = saved(tmp_path)
    assert not any(parameter.requires_grad for parameter in tokenizer._decoder.parameters())
    assert not tokenizer.encode(random_images(1, 16, 16)).requires_grad


def test_the_fingerprint_is_the_hash_of_the_weights(tmp_path):
    one, two = saved(tmp_path / "one", seed=0), saved(tmp_path / "two", seed=1)
    assert one.fingerprint == sha256(tmp_path / "one" / "dvae.safetensors") != two.fingerprint
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["dvae.json", "dvae.safetensors"]


def rewrite(path, change) -> None:
    """Change the tensors, and the card so that the hash fits."""
    tensors = load_file(path / "dvae.safetensors")
    old = sha256(path / "dvae.safetensors")
    change(tensors)
    save_file(tensors, path / "dvae.safetensors")
    card = (path / "dvae.json").read_text()
    (path / "dvae.json").write_text(card.replace(old, sha256(path / "dvae.safetensors")))


HEAD = "encoder.blocks.output.conv.b"
DAMAGE = {
    "no directory": (lambda p: [f.unlink() for f in p.iterdir()], "dvae.json is not there"),
    "no weights": (lambda p: (p / "dvae.safetensors").unlink(), "dvae.safetensors is not there"),
    "bit flip": (
        lambda p: (p / "dvae.safetensors").write_bytes((p / "dvae.safetensors").read_bytes()[:-1] + b"\x7f"),
        "damaged or replaced",
    ),
    "truncated": (
        lambda p: (p / "dvae.safetensors").write_bytes((p / "dvae.safetensors").read_bytes()[:-9]),
        "damaged or replaced",
    ),
    "no card": (lambda p: (p / "dvae.json").write_text("<html>"), "dvae.json': the whole: wanted JSON; got b'<html>'"),
    "another layout": (
        lambda p: (p / "dvae.json").write_text((p / "dvae.json").read_text().replace('"format": 1', '"format": 2')),
        "format: wanted at most 1; got 2",
    ),
    "another width": (
        lambda p: (p / "dvae.json").write_text((p / "dvae.json").read_text().replace('"n_hid": 8', '"n_hid": 12')),
        r"encoder.blocks.input.w wants \[12, 3, 7, 7\], found \[8, 3, 7, 7\]",
    ),
    "missing tensor": (lambda p: rewrite(p, lambda t: t.pop(HEAD)), rf"{HEAD} wants \[32\], found nothing"),
    "left-over tensor": (
        lambda p: rewrite(p, lambda t: t.update({"encoder.extra": torch.zeros(2)})),
        r"encoder.extra wants not to be there, found \[2\]",
    ),
    "wrong shape": (
        lambda p: rewrite(p, lambda t: t.update({HEAD: torch.zeros(31)})),
        rf"{HEAD} wants \[32\], found \[31\]",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_tokenizer_is_refused(tmp_path, damage, message):
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises(TokenizerError, match=message) as err:
        load_tokenizer(tmp_path)
    assert err.value.exit_code == (CHECKPOINT_UNUSABLE if any(tmp_path.iterdir()) else DATA_MISSING)


def test_a_tokenizer_that_is_no_safetensors_file_is_refused(tmp_path):
    saved(tmp_path)
    old = sha256(tmp_path / "dvae.safetensors")
    (tmp_path / "dvae.safetensors").write_text("<html>404</html>")
    card = (tmp_path / "dvae.json").read_text()
    (tmp_path / "dvae.json").write_text(card.replace(old, sha256(tmp_path / "dvae.safetensors")))
    with pytest.raises(TokenizerError, match="no safetensors file"):
        load_tokenizer(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written") as err:
        save_tokenizer(tmp_path / "file", Encoder(TINY))
    assert err.value.exit_code == CANNOT_WRITE


def test_a_disk_that_fills_up_leaves_no_parts(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastbeit.tokenizer.disk.put_in_place", full)
    with pytest.raises(RunError, match="No space left"):
        save_tokenizer(tmp_path, Encoder(TINY))
    assert not list(tmp_path.iterdir())
