"""Released weights become the same tokenizer, every tensor of them and nothing else."""

import os
import sys
from collections import OrderedDict
from pathlib import Path

import dall_e
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from fastbeit.cli import main
from fastbeit.config.tokenizer import Architecture
from fastbeit.errors import CHECKPOINT_UNUSABLE, TokenizerError
from fastbeit.files import sha256
from fastbeit.tokenizer.authors_vae import CustomizedArchitecture, CustomizedDecoder, CustomizedEncoder, CustomizedVAE
from fastbeit.tokenizer.disk import load_tokenizer
from fastbeit.tokenizer.fast import DiscreteVAE
from fastbeit.weights.tokenizers import import_tokenizer, read_released
from helpers.dalle import FORMATS, TINY, official, official_input, official_tokens, random_images, randomise, save
from helpers.hostile import refused


@pytest.fixture(autouse=True)
def unproven(monkeypatch):
    """Files here hold random weights; tests/weights/test_proof.py has trained ones."""
    monkeypatch.setattr("fastbeit.weights.tokenizers.prove", lambda encoder, decoder: "not proven")


NARROW = Architecture(n_hid=64, n_init=32, vocab_size=512)  # the narrowest that the dall-e package allows


@pytest.mark.parametrize("format", FORMATS)
def test_openais_modules_become_the_same_tokenizer(tmp_path, format, monkeypatch):
    encoder, decoder = official(NARROW)
    files = [save(encoder, tmp_path / "encoder.pkl", format), save(decoder, tmp_path / "decoder.pkl", format)]
    with monkeypatch.context() as patch:
        # their classes are not wanted
        for name in ("dall_e", "dall_e.encoder", "dall_e.decoder", "dall_e.utils", "attr"):
            patch.setitem(sys.modules, name, None)
        import_tokenizer(files, tmp_path / "dvae")
        tokenizer = load_tokenizer(tmp_path / "dvae")
    assert isinstance(tokenizer, DiscreteVAE) and tokenizer.arch == NARROW
    x, pixels = torch.rand(2, 3, 32, 48), random_images(2, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(read_released(files[0]).nets["encoder"](x), encoder(x), rtol=1e-4, atol=0)
        z = torch.rand(2, 512, 3, 4)
        torch.testing.assert_close(read_released(files[1]).nets["decoder"](z), decoder(z), rtol=1e-4, atol=0)
    assert torch.equal(tokenizer.encode(pixels), official_tokens(encoder, pixels))
    assert tokenizer.decode(tokenizer.encode(pixels), (4, 6)).shape == pixels.shape


def test_openais_encoder_at_its_full_size(tmp_path):
    encoder = dall_e.Encoder()
    file = save(encoder, tmp_path / "encoder.pkl")
    assert "53,786,240" in import_tokenizer([file], tmp_path / "dvae")
    pixels = random_images(1, 32, 40)
    assert torch.equal(load_tokenizer(tmp_path / "dvae").encode(pixels), official_tokens(encoder, pixels))


@pytest.mark.parametrize("wrapped", ["state_dict", ""])
@pytest.mark.parametrize("prefix", ["", "target_generator."])
@pytest.mark.parametrize("format", FORMATS)
def test_mmpretrains_state_dict(tmp_path, wrapped, prefix, format):
    encoder, _ = official(TINY)
    tensors = OrderedDict((prefix + key, value) for key, value in encoder.state_dict().items())
    value = {"meta": {"epoch": 1, "classes": ["a"]}, wrapped: tensors} if wrapped else tensors
    import_tokenizer([save(value, tmp_path / "dalle_encoder.pth", format)], tmp_path / "dvae")
    tokenizer, pixels = load_tokenizer(tmp_path / "dvae"), random_images(1, 32, 32)
    assert torch.equal(tokenizer.encode(pixels), official_tokens(encoder, pixels))
    with pytest.raises(TokenizerError, match="without a decoder"):
        tokenizer.decode(tokenizer.encode(pixels))


def test_flavas_codebook(tmp_path):
    flava = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=32))
    randomise(flava)
    file = save(flava.state_dict(), tmp_path / "pytorch_model.bin")
    import_tokenizer([file], tmp_path / "dvae")
    pixels = random_images(2, 32, 32)
    x = official_input(pixels)
    with torch.no_grad():
        torch.testing.assert_close(read_released(file).nets["encoder"](x), flava(x), rtol=1e-4, atol=0)
        tokens = flava.get_codebook_indices(x).flatten(1)
    assert torch.equal(load_tokenizer(tmp_path / "dvae").encode(pixels), tokens)


def test_flavas_codebook_with_a_tensor_by_both_names(tmp_path):
    tensors = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=32)).state_dict()
    tensors["blocks.input.b"] = tensors["blocks.input.bias"]
    refused(save(dict(tensors), tmp_path / "pytorch_model.bin"), "has blocks.input.b twice")


@pytest.mark.parametrize("format", FORMATS)
def test_the_authors_customised_file(tmp_path, format):
    arch = CustomizedArchitecture(num_layers=2, hidden_dim=8, codebook_dim=4, vocab_size=16)
    encoder, decoder = randomise(CustomizedEncoder(arch)), randomise(CustomizedDecoder(arch), 1)
    assert isinstance(encoder, CustomizedEncoder) and isinstance(decoder, CustomizedDecoder)
    file = save({"weights": {**encoder.state_dict(), **decoder.state_dict()}}, tmp_path / "pytorch_model.bin", format)
    import_tokenizer([file], tmp_path / "dvae")
    tokenizer = load_tokenizer(tmp_path / "dvae")
    assert isinstance(tokenizer, CustomizedVAE) and tokenizer.arch == arch
    ours, pixels = CustomizedVAE(encoder, lambda: decoder, ""), random_images(1, 8, 12)
    assert torch.equal(tokenizer.encode(pixels), ours.encode(pixels))
    ids = tokenizer.encode(pixels)
    assert torch.equal(tokenizer.decode(ids, (2, 3)), ours.decode(ids, (2, 3)))


def test_a_codebook_in_safetensors(tmp_path):
    save_file({"codebook": torch.rand(5, 12)}, tmp_path / "codebook.safetensors", {"order": "chw"})
    import_tokenizer([tmp_path / "codebook.safetensors"], tmp_path / "dvae")
    assert load_tokenizer(tmp_path / "dvae").encode(random_images(1, 4, 6)).shape == (1, 6)


def test_the_card_says_where_the_weights_come_from(tmp_path, capsys):
    encoder, decoder = official(TINY)
    files = [save(decoder, tmp_path / "d.pkl", "legacy"), save(encoder, tmp_path / "e.pkl")]
    assert main(["tokenizer", "import", *map(str, files), "-o", str(tmp_path / "dvae")]) == 0
    num_parameters = sum(p.numel() for p in encoder.parameters())
    text = capsys.readouterr().out
    assert f"e.pkl: encoder of {num_parameters:,} parameters" in text and "32 words; encodes and decodes" in text
    card = (tmp_path / "dvae" / "dvae.json").read_text()
    for said in ("d.pkl", sha256(files[0]), sha256(files[1]), "whole module, legacy", '"n_init": 8', '"n_hid": 8'):
        assert said in card


def test_values_keep_their_dtype_and_their_order(tmp_path):
    encoder, _ = official(TINY)
    tensors = {key: value.half() for key, value in encoder.state_dict().items()}
    last = tensors["blocks.input.w"] = tensors["blocks.input.w"].to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    import_tokenizer([save(tensors, tmp_path / "half.pth")], tmp_path / "dvae")
    found = load_file(tmp_path / "dvae" / "dvae.safetensors")
    for key, value in tensors.items():
        assert torch.equal(found["encoder." + key], value) and value.dtype == torch.float16


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_that_lie_in_one_storage(tmp_path, format):
    tensors = official(TINY)[0].state_dict()
    flat = torch.cat([value.flatten() for value in tensors.values()])
    parts = flat.split([value.numel() for value in tensors.values()])
    views = {key: part.view(value.shape) for part, (key, value) in zip(parts, tensors.items(), strict=True)}
    found = read_released(save(views, tmp_path / "x.pth", format)).nets["encoder"].state_dict()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


def mixed(tmp_path: Path, *archs: Architecture) -> list[Path]:
    """An encoder of the first, decoders of the others."""
    nets = [official(arch)[min(i, 1)] for i, arch in enumerate(archs)]
    return [save(net, tmp_path / f"{i}.pkl") for i, net in enumerate(nets)]


OTHER_WORDS, OTHER_WIDTH = Architecture(n_hid=8, vocab_size=40), Architecture(n_hid=12, vocab_size=32)


@pytest.mark.parametrize(
    "archs, chosen, message",
    [
        ((TINY, OTHER_WORDS), [0, 1], "vocab_size is 32 in the encoder, 40 in the decoder"),
        ((TINY, OTHER_WIDTH), [1, 0], "n_hid is 8 in the encoder, 12 in the decoder"),
        ((TINY, TINY), [1], "holds a decoder alone"),
        ((TINY,), [0, 0], "holds a second encoder"),
        ((TINY, TINY, TINY), [0, 1, 2], "holds a second decoder"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, archs, chosen, message):
    files = mixed(tmp_path, *archs)
    with pytest.raises(TokenizerError, match=message):
        import_tokenizer([files[i] for i in chosen], tmp_path / "dvae")
    assert not (tmp_path / "dvae").exists()


LAST = "blocks.output.conv.w"
CHANGES = {
    "missing": (lambda t: t.pop("blocks.group_3.block_2.res_path.conv_3.b"), r"conv_3.b nowhere, wants it \[8\]"),
    "more": (lambda t: t.update({"blocks.more": torch.ones(2)}), r"blocks.more \[2\], wants it nowhere"),
    "shape": (lambda t: t.update({"blocks.input.b": torch.ones(9)}), r"blocks.input.b \[9\], wants it \[8\]"),
    "width": (lambda t: t.update({"blocks.input.w": torch.ones(6, 3, 7, 7)}), "n_hid: wanted a multiple of 4; got 6"),
    "too wide": (lambda t: t.update({"blocks.input.w": torch.ones(5000, 3, 7, 7)}), "n_hid 5000; 4096 is the most"),
    "groups": (lambda t: t.update({f"blocks.group_{i}.x": torch.ones(1) for i in range(99)}), "group_count 99; 8 is"),
    "dimensions": (lambda t: t.update({LAST: torch.ones(32, 64)}), r"conv.w with 4 dimensions, found \[32, 64\]"),
    "two nets": (lambda t: t.update({"a.blocks.input.b": torch.ones(8)}), r"a.blocks.input.b \[8\], wants it nowhere"),
    "beside": (lambda t: t.update({"x.blocks.input.w": t.pop("blocks.input.w")}), r"beside tensors of x.\*; give the"),
    "nothing": (lambda t: t.clear(), "found no tensor at all"),
    "others": (lambda t: (t.clear(), t.update(fc=torch.ones(2))), "found fc"),
    "NaN": (lambda t: t.update({LAST: t[LAST] * torch.nan}), "conv.w holds NaN or infinity"),
    "no tensor": (lambda t: t.update({LAST: [1.0]}), "a tensor under blocks.output.conv.w, found list"),
    "float64": (lambda t: t.update({LAST: t[LAST].double()}), "of torch.float64; .* torch.float32, "),
    "int64": (lambda t: t.update({LAST: t[LAST].long()}), "of torch.int64; "),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=list(CHANGES))
def test_every_tensor_is_wanted_and_no_other(tmp_path, change, message):
    tensors = dict(official(TINY)[0].state_dict())
    change(tensors)
    refused(save(tensors, tmp_path / "encoder.pth"), message)


def test_a_buffer_is_a_tensor_too_many(tmp_path):
    encoder, _ = official(TINY)
    encoder.register_buffer("extra", torch.ones(1))
    refused(save(encoder, tmp_path / "x.pkl"), r"has extra \[1\], wants it nowhere")


class OfPython2(OrderedDict):
    def __reduce__(self):
        return OrderedDict, (list(map(list, self.items())),)


def test_an_ordered_dict_as_python_2_wrote_it(tmp_path):
    tensors = official(TINY)[0].state_dict()
    found = read_released(save(OfPython2(tensors), tmp_path / "x.pth")).nets["encoder"].state_dict()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("format", FORMATS)
def test_code_inside_of_a_real_module(tmp_path, format, capsys):
    encoder, _ = official(TINY)
    vars(encoder)["extra"] = Hostile(tmp_path / "ran")
    file = save(encoder, tmp_path / "x.pkl", format)
    assert main(["tokenizer", "import", str(file), "-o", str(tmp_path / "dvae")]) == CHECKPOINT_UNUSABLE
    assert capsys.readouterr().err == f"fastbeit tokenizer: '{file}' wants posix.system: refused, nothing was run\n"
    assert not (tmp_path / "ran").exists() and not (tmp_path / "dvae").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_a_byte_changed_or_cut_anywhere(tmp_path, format):
    """Half of the places in the pickle, which is a hundredth of the file."""
    encoder, _ = official(TINY)
    whole = save(encoder, tmp_path / "whole.pkl", format).read_bytes()
    shapes = {key: value.shape for key, value in encoder.state_dict().items()}
    pickle_end = whole.index(b"data/0") if format == "zip" else whole.rindex(b"ub.")
    rng, file, num_read = np.random.default_rng(0), tmp_path / "x.pkl", 0
    for i in range(200):
        place = int(rng.integers((pickle_end, len(whole))[i % 2]))
        if i % 5 == 4:
            content = whole[:place] + whole[place + int(rng.integers(1, 9)) :] if i % 10 == 4 else whole[:place]
        else:
            content = bytearray(whole)
            content[place] = (content[place] + int(rng.integers(1, 256))) % 256
        file.write_bytes(content)
        try:
            released = read_released(file)
        except TokenizerError:
            continue
        num_read += 1
        assert {key: value.shape for key, value in released.nets["encoder"].state_dict().items()} == shapes
    # most attributes of a module are of no interest
    assert 0 < num_read < 160
