"""The BEiT authors' own dVAE, `--discrete_vae_type customized`."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastbeit.tokenizer.authors_vae import CustomizedArchitecture, CustomizedDecoder, CustomizedEncoder, CustomizedVAE
from fastbeit.tokenizer.disk import load_tokenizer, save_tokenizer
from helpers.kinds import SMALL, official_of, photo, random_images, transplanted


def test_customized_parameter_counts_are_those_of_the_authors():
    def count(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    with torch.device("meta"):
        encoder, decoder = CustomizedEncoder(CustomizedArchitecture()), CustomizedDecoder(CustomizedArchitecture())
    assert (count(encoder), count(decoder.decoder), count(decoder.codebook)) == (7_953_408, 7_933_699, 4_194_304)


# 1 and 3 layers: the first is also the last; the authors' depth
@pytest.mark.parametrize("num_layers, size", [(1, (6, 10)), (2, (16, 16)), (3, (24, 16))])
def test_customized_equals_the_authors(num_layers, size):
    arch = CustomizedArchitecture(num_layers=num_layers, hidden_dim=12, codebook_dim=5, vocab_size=40)
    official = official_of(arch)
    encoder, decoder = transplanted(official, arch)
    x = torch.rand(2, 3, *size) * 2 - 1
    # the same convolutions in the same order
    assert torch.equal(encoder(x), official.encoder(x))
    ids = torch.randint(0, 40, (2, 3, 4))
    assert torch.equal(decoder(ids), official.decode(ids))


def test_customized_tokens_and_images_are_those_of_the_authors(tmp_path):
    """At full size, through the files; as the authors normalise: (x - 0.5) / 0.5."""
    arch = CustomizedArchitecture()
    official = official_of(arch)
    with torch.no_grad():
        # pixels from past black to past white
        weight, bias = list(official.decoder.parameters())[-2:]
        weight.mul_(300)
        bias.sub_(official.decode(torch.arange(8).view(1, 2, 4)).mean((0, 2, 3)))
    save_tokenizer(tmp_path, *transplanted(official, arch))
    assert load_file(tmp_path / "dvae.safetensors").keys() == official.state_dict().keys()
    tokenizer = load_tokenizer(tmp_path)
    images = random_images(2, 24, 40)
    pixels = images.permute(0, 3, 1, 2).contiguous().float() / 255
    with torch.no_grad():
        ids = official.get_codebook_indices((pixels - 0.5) / 0.5)
        decoded = official.decode(ids) * 0.5 + 0.5
    assert torch.equal(tokenizer.encode(images), ids.flatten(1)) and tokenizer.grid((24, 40)) == (3, 5)
    ours = tokenizer.decode(ids.flatten(1), (3, 5))
    assert decoded.min() < -0.1 and decoded.max() > 1.1
    assert ours.shape == images.shape and ours.dtype == torch.uint8
    # half a step of rounding, and the noise of float32
    assert (ours.permute(0, 3, 1, 2) - 255 * decoded.clamp(0, 1)).abs().max() <= 0.5 + 1e-3


def test_customized_is_frozen_and_the_last_layer_stays_float32(tmp_path):
    official = official_of(SMALL)
    save_tokenizer(tmp_path, *transplanted(official, SMALL))
    images = photo("chelsea.png", 64)
    full, half = load_tokenizer(tmp_path), load_tokenizer(tmp_path, dtype=torch.bfloat16)
    assert isinstance(half, CustomizedVAE) and half.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in half._trunk.parameters())
    assert {parameter.dtype for parameter in half._trunk.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in half._head} == {torch.float32}
    # random weights, whose logits lie closer together than those of a trained net
    assert (half.encode(images) == full.encode(images)).double().mean() > 0.9
