"""Weights prove that they are a trained tokenizer, or nothing is written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbeit.cli import main
from fastbeit.config.tokenizer import Architecture
from fastbeit.errors import CHECKPOINT_UNUSABLE, TokenizerError
from fastbeit.tokenizer.authors_vae import CustomizedArchitecture, CustomizedDecoder, CustomizedEncoder
from fastbeit.tokenizer.codebook import CodebookArchitecture, CodebookDecoder, CodebookEncoder
from fastbeit.tokenizer.disk import bundled_path, load_tokenizer
from fastbeit.tokenizer.dvae import Decoder, Encoder
from fastbeit.weights import download
from fastbeit.weights.proof import mean_colour_psnr_db, pictures, prove
from helpers.dalle import TINY, official, randomise, save

BUNDLED = Architecture(n_hid=32, n_init=64, vocab_size=1024)
CUSTOMIZED = CustomizedArchitecture(hidden_dim=64)


def bundled(folder: Path, *roles: str) -> list[str]:
    """State dicts of the bundled tokenizer, under OpenAI's names."""
    tensors = load_file(bundled_path())
    return [
        str(save({k.removeprefix(role): v for k, v in tensors.items() if k.startswith(role)}, folder / f"{role}pth"))
        for role in roles
    ]


def random_files(folder: Path) -> list[str]:
    return [str(save(net, folder / f"{i}.pkl")) for i, net in enumerate(official(TINY))]


def test_a_trained_tokenizer_passes(tmp_path, capsys):
    out = tmp_path / "dvae"
    assert main(["tokenizer", "import", *bundled(tmp_path, "encoder.", "decoder."), "-o", str(out)]) == 0
    report = capsys.readouterr().out
    assert "PSNR 24.4 dB (their mean colours: 15.2), words in use 379" in report
    agreement = float(report.partition("379; ")[2].partition(" % of the tokens in fp16")[0])
    assert 98 < agreement <= 100
    images = pictures(112, 112)
    assert torch.equal(load_tokenizer(out).encode(images), load_tokenizer().encode(images))


def test_an_encoder_alone_is_judged_by_its_words(tmp_path, capsys):
    assert main(["tokenizer", "import", *bundled(tmp_path, "encoder."), "-o", str(tmp_path / "dvae")]) == 0
    report = capsys.readouterr().out
    assert "words in use 379" in report and "PSNR" not in report


def test_random_weights_are_refused(tmp_path, capsys):
    out = tmp_path / "dvae"
    assert main(["tokenizer", "import", *random_files(tmp_path), "-o", str(out)]) == CHECKPOINT_UNUSABLE
    message = capsys.readouterr().err
    assert "not the trained tokenizer that they claim to be: on 6 test pictures: PSNR" in message
    assert "at least PSNR of 18.2 dB and 16 words in use wanted; no tokenizer was written" in message
    assert not out.exists()


def test_a_tokenizer_that_is_there_is_not_replaced(tmp_path, capsys):
    files, out = bundled(tmp_path, "encoder.", "decoder."), tmp_path / "dvae"
    # nothing is lost by the same once more, and then with a decoder
    for given in (files[:1], files[:1], files):
        assert main(["tokenizer", "import", *given, "-o", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.glob("dvae.*")}
    for command in (["import", files[0]], ["import", *random_files(tmp_path)], ["fetch"], ["fetch", "--from", "flava"]):
        assert main(["tokenizer", *command, "-o", str(out)]) == 2
        assert f"'{out}' holds another tokenizer, which would be lost; choose another -o" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.glob("dvae.*")} == before


def test_random_weights_that_were_fetched(tmp_path, capsys):
    names = download.SOURCES["openai"].files
    for net, name in zip(official(TINY), names, strict=True):
        save(net, tmp_path / name)
    assert main(["tokenizer", "fetch", "-o", str(tmp_path)]) == CHECKPOINT_UNUSABLE
    assert "not the trained tokenizer" in (message := capsys.readouterr().err)
    assert f"delete what is wrong in '{tmp_path}'" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


# as they are made, and with biases too; the sizes and kinds that are imported, OpenAI's own a quarter as wide
@pytest.mark.parametrize("drawn", [lambda net: net, randomise], ids=["made", "drawn"])
@pytest.mark.parametrize(
    "nets",
    [
        *[lambda arch=arch: (Encoder(arch), Decoder(arch)) for arch in (TINY, BUNDLED, Architecture(n_hid=64))],
        lambda: (CustomizedEncoder(CUSTOMIZED), CustomizedDecoder(CUSTOMIZED)),
    ],
    ids=["tiny", "bundled", "openai", "customized"],
)
def test_random_nets_fail(drawn, nets):
    torch.manual_seed(0)
    encoder, decoder = map(drawn, nets())
    with pytest.raises(TokenizerError, match="PSNR of 18.2 dB"):
        prove(encoder, decoder)


@pytest.mark.parametrize("seed", range(3))
def test_random_encoders_fail_by_their_words(seed):
    torch.manual_seed(seed)
    for encoder in (Encoder(BUNDLED), CustomizedEncoder(CUSTOMIZED)):
        with pytest.raises(TokenizerError, match="at least 60 words in use wanted"):
            prove(encoder, None)


def test_words_without_their_own_decoder_fail():
    """Both files are of a release, and belong to two trainings of one size."""
    tensors = load_file(bundled_path())
    encoder, decoder = Encoder(BUNDLED), Decoder(BUNDLED)
    for net, role in (encoder, "encoder."), (decoder, "decoder."):
        net.load_state_dict({key: tensors[role + key].float() for key in net.state_dict()})
    first = decoder.get_parameter("blocks.input.w")
    first.data = first.data.roll(1, dims=1)
    with pytest.raises(TokenizerError, match="PSNR of 18.2 dB wanted"):
        prove(encoder, decoder)


def test_codebooks(tmp_path):
    torch.manual_seed(0)
    arch = CodebookArchitecture(vocab_size=64, patch_size=8, order="chw")
    encoder = CodebookEncoder(arch)
    with pytest.raises(TokenizerError, match="words in use 1; at least 2 words in use wanted"):
        prove(encoder, CodebookDecoder(arch))
    encoder.codebook.data = torch.rand(64, 3, 1).expand(64, 3, 64).flatten(1)
    assert "it always computes in fp32" in prove(encoder, CodebookDecoder(arch))


def test_pictures_are_always_the_same():
    images = pictures(112, 112)
    assert images.shape == (6, 112, 112, 3) and torch.equal(images, pictures(112, 112))
    assert mean_colour_psnr_db(images) == pytest.approx(15.21, abs=0.01)
