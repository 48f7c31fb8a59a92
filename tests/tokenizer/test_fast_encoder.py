"""The fast encoder gives the tokens of the plain one, for each image alone, in little memory and in any precision."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import PeakMemory
from fastbeit.config.tokenizer import Architecture
from fastbeit.errors import TokenizerError
from fastbeit.tokenizer import fast, frozen
from fastbeit.tokenizer.dvae import Decoder, Encoder, one_hot, to_mapped
from fastbeit.tokenizer.fast import Conv, CudnnConv, DiscreteVAE, FastEncoder, OneDnnConv, conv_on
from fastbeit.tokenizer.frozen import Strided, likeliest_words
from fastbeit.tokenizer.precision import choose_tokenizer, encoding_dtype, token_agreement
from helpers.kinds import random_images
from helpers.tiny import PHOTOS, photo_folder

ARCHITECTURES = {
    "narrow": Architecture(n_hid=16, n_init=8, vocab_size=64),
    # 36 and 16 to divide by: the first shifts no exponent, so that folding rounds; a group alone has no pool
    "three groups": Architecture(n_hid=8, n_init=8, vocab_size=32, group_count=3),
    "one group": Architecture(n_hid=8, n_init=8, vocab_size=32, group_count=1, n_blk_per_group=4),
    "odd": Architecture(n_hid=4, n_init=4, vocab_size=7),
}


def make_encoder(arch: Architecture, seed: int = 0) -> Encoder:
    """Random weights, biases too, and a last bias that makes all words equally likely on the photos, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(arch)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            fan_in = parameter[0].numel() if name.endswith("w") else 16
            parameter.normal_(std=fan_in**-0.5, generator=generator)
        encoder.get_parameter("blocks.output.conv.b").sub_(encoder(to_mapped(photos())).mean((0, 2, 3)))
    return encoder


def photos(size: tuple[int, int] = (64, 64)) -> Tensor:
    """uint8 [4, h, w, 3]."""
    images = [Image.open(photo_folder() / name).convert("RGB").resize((size[1], size[0])) for name in PHOTOS]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def logits_of(encoder: FastEncoder, x: Tensor) -> Tensor:
    return encoder.head(encoder.features(x))


def make_fast(encoder: Encoder, kind: type[Conv], monkeypatch: pytest.MonkeyPatch, together: int = 1) -> FastEncoder:
    monkeypatch.setattr(fast, "conv_on", lambda device, dtype: kind)
    monkeypatch.setitem(fast.TOGETHER, "cpu", together)
    return FastEncoder(encoder, torch.float32)


class CudnnOnCpu(TorchDispatchMode):
    """Gives cuDNN's operator its meaning, so that the branch for CUDA runs, if not on a card."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.cudnn_convolution_relu.default:
            assert not kwargs
            self.calls += 1
            x, weight, bias, stride, padding, dilation, groups = args
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Conv, OneDnnConv, CudnnConv])
@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
@torch.no_grad()
def test_equals_the_plain_encoder(arch, kind, monkeypatch):
    encoder = make_encoder(arch)
    images = to_mapped(photos((48, 80)))
    ours = make_fast(encoder, kind, monkeypatch, together=2)
    with CudnnOnCpu() as mode:
        logits, tokens = logits_of(ours, images), ours(images)
    assert (mode.calls > 0) == (kind is CudnnConv)
    expected = encoder(images)
    # float32 carries 6e-8; sums of a hundred terms, a dozen layers deep
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    height, width = images.shape[2] // arch.stride, images.shape[3] // arch.stride
    assert tokens.dtype == torch.int64 and tokens.shape == (len(images), height * width)
    best = expected.max(1)[0]
    chosen = expected.gather(1, tokens.view(len(images), 1, height, width))[:, 0]
    # another word only where the two are as likely, to rounding
    assert (best - chosen).max() <= 1e-5 * expected.abs().max()
    assert (chosen == best).double().mean() > 0.99 and len(tokens.unique()) > arch.vocab_size // 2


@pytest.mark.parametrize("kind, together", [(OneDnnConv, 1), (OneDnnConv, 4), (Conv, 1), (Conv, 4)])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_tokens_do_not_depend_on_the_batch(kind, together, seed, monkeypatch):
    encoder = make_fast(make_encoder(ARCHITECTURES["narrow"], seed), kind, monkeypatch, together)
    seen = []
    features = encoder.features
    monkeypatch.setattr(encoder, "features", lambda x: seen.append(features(x)) or seen[-1])
    images = to_mapped(torch.cat([photos(), photos().flip(2)])[:7])
    tokens = encoder(images)
    of_batch = torch.cat(seen)[:7]
    seen.clear()
    assert torch.equal(torch.cat([encoder(image[None]) for image in images]), tokens)
    # to the bit, not merely in what is likeliest
    assert torch.equal(torch.cat([part[:1] for part in seen]), of_batch)
    assert torch.equal(encoder(images.flip(0)), tokens.flip(0))
    assert encoder(images[:0]).shape == (0, 64)


@torch.no_grad()
def test_other_sizes_in_between_change_nothing():
    encoder = FastEncoder(make_encoder(ARCHITECTURES["narrow"]), torch.float32)
    images = to_mapped(photos())
    tokens = encoder(images)
    assert encoder(to_mapped(photos((32, 96)))).shape == (4, 48)
    assert torch.equal(encoder(images), tokens)


def test_the_encoder_it_is_made_from_is_left_alone():
    encoder = make_encoder(ARCHITECTURES["narrow"]).train()
    before, images = copy.deepcopy(encoder.state_dict()), photos()
    tokenizer = DiscreteVAE(encoder, lambda: pytest.fail("the decoder is not wanted"), "")
    tokens = tokenizer.encode(images)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training and all(parameter.requires_grad for parameter in encoder.parameters())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert torch.equal(tokenizer.encode(images), tokens) and not tokens.requires_grad


def test_the_operators_are_those_of_the_device():
    cpu = torch.device("cpu")
    assert conv_on(cpu, torch.float32) is OneDnnConv
    assert conv_on(torch.device("meta"), torch.float32) is Conv
    half = OneDnnConv if torch.ops.mkldnn._is_mkldnn_fp16_supported() else Conv
    assert conv_on(cpu, torch.float16) is half


# with words that nothing sets apart, as here, rounding turns the most: 3 to 4 % of tokens in bfloat16, which has 8
# significant bits, and 0.3 to 0.6 % in float16, which has 11 (over four seeds); 10 and 2 % are allowed
@pytest.mark.parametrize("dtype, wanted", [(torch.bfloat16, 0.9), (torch.float16, 0.98)])
def test_rounding_turns_few_tokens(dtype, wanted):
    encoder = make_encoder(ARCHITECTURES["narrow"])
    exact, rounded = (DiscreteVAE(encoder, lambda: pytest.fail(), "", kind) for kind in (torch.float32, dtype))
    agreement = token_agreement(rounded, exact, photos((128, 128)))
    # all tokens alike would mean that nothing was rounded
    assert wanted <= agreement < 1


@torch.no_grad()
def test_the_head_sums_in_float32():
    """1 + 2^-9 and 1 are the same number in bfloat16: words that only an unrounded sum tells apart."""
    rows = torch.ones(1, 4, dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0, 0, 0], [1.0, 2**-9, 0, 0], [1.0, 2**-9, 0, 0]], dtype=torch.bfloat16)
    assert likeliest_words(rows, weight, torch.zeros(3)).tolist() == [1]
    assert likeliest_words(rows.to("meta"), weight.to("meta"), torch.zeros(3, device="meta")).shape == (1,)


@torch.no_grad()
def test_memory_is_bounded():
    arch = Architecture(n_hid=32, vocab_size=8192)
    with torch.device("meta"):
        encoder = Encoder(arch)
        x = torch.empty(128, 3, 112, 112)
    ours = FastEncoder(encoder, torch.float32)
    with PeakMemory() as official:
        encoder(x).argmax(1)
    peaks = {}
    for together in (1, fast.TOGETHER_ON_GPU):
        ours.together = together
        with PeakMemory() as memory:
            assert ours(x).shape == (128, 196)
        peaks[together] = memory.peak
    # all logits are there at once, and ours never
    assert official.peak > 4 * 128 * 196 * 8192
    # of an image: two widest tensors, a narrow one and its pixels; and all tokens
    body, tokens = 4 * 112 * 112 * (2 * 32 + 8 + 3), 8 * 128 * 196
    assert peaks[1] <= max(body, 4 * 1.1 * 196 * 8192) + tokens
    assert peaks[fast.TOGETHER_ON_GPU] <= fast.TOGETHER_ON_GPU * body + tokens <= official.peak / 3


def test_an_overflow_is_an_error_and_no_token():
    encoder = make_encoder(ARCHITECTURES["narrow"])
    with torch.no_grad():
        encoder.get_parameter("blocks.input.w").mul_(1e5)
    half = DiscreteVAE(encoder, lambda: pytest.fail(), "", torch.float16)
    with pytest.raises(
        TokenizerError, match=r"not finite in torch.float16, which ends at 6.55e\+04; set tokenizer.pre"
    ):
        half.encode(photos())
    for dtype in (torch.float32, torch.bfloat16):
        DiscreteVAE(encoder, lambda: pytest.fail(), "", dtype).encode(photos())


@torch.no_grad()
def test_words_are_decoded_without_one_hot_vectors():
    torch.manual_seed(0)
    decoder = Decoder(ARCHITECTURES["narrow"])
    for parameter in decoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(64, (2, 3, 5))
    torch.testing.assert_close(decoder.decode_words(ids), decoder(one_hot(ids, 64)), rtol=1e-5, atol=1e-6)


class Fake(Strided):
    """Disagrees with another at some of a thousand tokens."""

    vocab_size, stride, fingerprint, device = 2, 1, "", torch.device("cpu")

    def __init__(self, num_other: int = 0) -> None:
        self.num_other = num_other

    def encode(self, images: Tensor) -> Tensor:
        if self.num_other < 0:
            raise TokenizerError("inf")
        return (torch.arange(1000) < self.num_other).long().view(len(images), -1)

    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize(
    "asked, device, num_other, used, said",
    [
        ("auto", "cpu", 500, "fp32", "^tokenizer: fp32$"),
        ("fp32", "cuda", 500, "fp32", "^tokenizer: fp32$"),
        ("auto", "cuda", 10, "fp16", "^tokenizer: fp16, 99.00 % of tokens are those of fp32, on 4 images$"),
        ("auto", "cuda", 11, "fp32", "^tokenizer: fp32, since in fp16 98.90 % .*; 99% are wanted$"),
        ("auto", "cuda", -1, "fp32", "^tokenizer: fp32, since fp16 overflows: inf$"),
        ("bf16", "cpu", 0, "bf16", "^tokenizer: bf16, 100.00 %"),
        ("fp16", "cpu", 11, "fp16", "^WARNING: tokenizer: fp16, 98.90 % .* set tokenizer.precision=fp32$"),
    ],
)
def test_precision_is_kept_where_it_keeps_the_tokens(asked, device, num_other, used, said):
    made = {torch.float32: Fake(), torch.bfloat16: Fake(num_other), torch.float16: Fake(num_other)}
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    chosen = choose_tokenizer(made.__getitem__, asked, torch.device(device), images)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[used]
    assert (chosen.tokenizer, chosen.precision) == (made[dtype], used)
    assert chosen.agreement == (1 if used == "fp32" else 1 - num_other / 1000)
    assert re.search(said, chosen.line), chosen.line


def test_a_precision_asked_for_by_name_that_overflows_is_refused():
    made = {torch.float32: Fake(), torch.float16: Fake(-1)}
    with pytest.raises(TokenizerError):
        choose_tokenizer(made.__getitem__, "fp16", torch.device("cpu"), torch.zeros(4, 8, 8, 3, dtype=torch.uint8))


def test_dtypes():
    assert encoding_dtype("auto", torch.device("cuda", 1)) == torch.float16
    assert encoding_dtype("bf16", torch.device("cpu")) == torch.bfloat16


# 1000: 30 rows of 33 words; 20: not even one row, of which less cannot be held
@pytest.mark.parametrize("scratch, most", [(1000, 30 * 33), (20, 33)])
def test_likeliest_words_are_those_of_the_whole_product_and_never_hold_it(monkeypatch, scratch, most):
    monkeypatch.setattr(frozen, "SCRATCH", scratch)
    features, weight, bias = torch.randn(77, 12), torch.randn(33, 12), torch.randn(33)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if func is torch.ops.aten.addmm.default:
                self.size = max(self.size, out.numel())
            return out

    with Largest() as largest:
        found = likeliest_words(features, weight, bias)
    assert torch.equal(found, (features.double() @ weight.T.double() + bias).argmax(1))
    assert largest.size == most


def test_likeliest_words_of_half_precision_features_are_compared_in_float32():
    features, weight = torch.randn(50, 12).bfloat16(), torch.randn(1000, 12)
    assert torch.equal(likeliest_words(features, weight, torch.zeros(1000)), (features.float() @ weight.T).argmax(1))


def test_of_equal_scores_the_first_word_is_taken():
    assert likeliest_words(torch.ones(3, 2), torch.zeros(5, 2), torch.tensor([0.0, 1, 1, 0, 1])).tolist() == [1, 1, 1]
    assert likeliest_words(torch.ones(0, 2), torch.zeros(5, 2), torch.zeros(5)).shape == (0,)


def test_batches_have_one_size_so_that_an_image_has_the_same_tokens_in_any(monkeypatch):
    seen = []

    def encode(batch):
        seen.append(batch.shape)
        return batch.flatten(1).sum(1, dtype=torch.int64)[:, None]

    images = random_images(7, 4, 4)
    assert torch.equal(frozen.in_fixed_batches(encode, images, 3), encode(images))
    assert seen[:-1] == [(3, 4, 4, 3)] * 3
