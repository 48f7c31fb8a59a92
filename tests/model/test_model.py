"""The model: the authors' names and numbers, Hugging Face's outputs and gradients, and what each decision keeps."""

import math
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.huggingface import build_huggingface
from fastbeit.config.running import Kernels
from fastbeit.config.sections import MaskingConfig, ModelConfig
from fastbeit.masking import UNUSED, MaskRule, draw, label
from fastbeit.model.beit import Beit
from fastbeit.weights.huggingface import rename
from fastbeit_kernels.backend import INTERPRETED
from helpers.weights import randomise

# the real window, patch and vocabulary; narrow, so that a step takes a moment
SMALL: dict[str, Any] = {"width": 64, "depth": 3, "num_heads": 4, "mlp_width": 128, "drop_path": 0.0}
TINY: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 4, "mlp_width": 64, "patch_size": (4, 4)}
LARGE: dict[str, Any] = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_width": 4096, "layer_scale": 1e-5}
ABSOLUTE: dict[str, Any] = {"relative_position": "none", "absolute_position": True, "layer_scale": 0.0}
VARIANTS = {"shared": {}, "per_block": {"relative_position": "per_block"}, "absolute": ABSOLUTE}


interpreted = pytest.mark.skipif(not INTERPRETED, reason="on the CPU Triton is interpreted or not there")


def build(
    image_size=(224, 224), num_outputs=8192, objective: Any = "tokens", kernels: Kernels | None = None, **fields: Any
) -> Any:
    """A `Beit`; Any, for the types of a module's parts are not known to pyright."""
    return Beit(
        ModelConfig(**fields),
        image_size=image_size,
        num_outputs=num_outputs,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        kernels=kernels or Kernels(),
        objective=objective,
    )


class Prediction(NamedTuple):
    """What the model is given beside the images."""

    masked: Tensor
    predict_idx: Tensor
    labels: Tensor


def inputs(image_size=(224, 224), grid=(14, 14), num_masked=75, num_words=8192, batch=2) -> tuple[Tensor, Prediction]:
    """Images and what to predict: at most `num_masked` patches (72 and 74 of 75); 0: all is seen, all predicted."""
    images = torch.randint(0, 256, (batch, *image_size, 3), dtype=torch.uint8)
    tokens = torch.randint(0, num_words, (batch, grid[0] * grid[1]))
    kind, predict = ("blockwise", "masked") if num_masked else ("none", "all")
    config = MaskingConfig.model_validate({"num_masked": num_masked or 1, "min_block": min(num_masked, 16) or 1})
    rule = MaskRule(kind, config, grid, 10, predict)
    slots = draw(rule, torch.zeros(batch, dtype=torch.int64), torch.arange(batch))
    return images, Prediction(slots.masked, slots.predict_idx, label(slots, tokens.gather(1, slots.predict_idx)))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def run(model: Beit, images: Tensor, prediction: Prediction) -> Tensor:
    """The mean loss; gradients are left in the model."""
    model.zero_grad()
    loss_sum, _ = model(images, prediction.masked, prediction.predict_idx, prediction.labels)
    loss = loss_sum / (prediction.labels != UNUSED).sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    "fields, num_parameters, num_entries",
    [
        ({}, 91_965_776, 190),
        (LARGE, 311_534_016, 370),
        (ABSOLUTE, 92_089_856, 165),
    ],
    ids=["base", "large", "absolute"],
)
def test_official_sizes(fields, num_parameters, num_entries):
    with torch.device("meta"):
        model = build(**fields)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert len(model.state_dict()) == num_entries


def test_official_names():
    """The authors' state dict of BEiT-B, and where fine-tuning keeps its tables."""
    block = {
        "gamma_1": [768], "gamma_2": [768], "norm1.weight": [768], "norm1.bias": [768], "attn.q_bias": [768],
        "attn.v_bias": [768], "attn.qkv.weight": [2304, 768], "attn.proj.weight": [768, 768], "attn.proj.bias": [768],
        "norm2.weight": [768], "norm2.bias": [768], "mlp.fc1.weight": [3072, 768], "mlp.fc1.bias": [3072],
        "mlp.fc2.weight": [768, 3072], "mlp.fc2.bias": [768],
    }  # fmt: skip
    expected = {
        "cls_token": [1, 1, 768], "mask_token": [1, 1, 768],
        "patch_embed.proj.weight": [768, 3, 16, 16], "patch_embed.proj.bias": [768],
        "rel_pos_bias.relative_position_bias_table": [732, 12], "rel_pos_bias.relative_position_index": [197, 197],
        "norm.weight": [768], "norm.bias": [768], "lm_head.weight": [8192, 768], "lm_head.bias": [8192],
    } | {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}  # fmt: skip
    with torch.device("meta"):
        shared, per_block = build(), build(relative_position="per_block")
    assert {name: list(tensor.shape) for name, tensor in shared.state_dict().items()} == expected
    tables = {f"blocks.{i}.attn.relative_position_{part}" for i in range(12) for part in ("bias_table", "index")}
    assert tables <= set(per_block.state_dict()) and "rel_pos_bias" not in str(list(per_block.state_dict()))
    assert shared.state_dict()["rel_pos_bias.relative_position_index"].dtype == torch.int64


def test_base_flops():
    """Design D7: the last block and the head work on the 75 slots alone; 112.5 GFLOP without that."""
    with torch.device("meta"):
        model = build()
        images = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
        masked, slots = torch.zeros(1, 196, dtype=torch.bool), torch.zeros(1, 75, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.logits(images, masked, slots).sum().backward()
    assert counter.get_total_flops() / 1e9 == pytest.approx(104.1, abs=0.05)


@pytest.mark.parametrize(
    "variant, num_masked, attention",
    [*product(VARIANTS, (0, 75), ("sdpa", "eager")), pytest.param("shared", 75, "triton", marks=interpreted)],
)
def test_equal_to_huggingface(variant: str, num_masked: int, attention: Any):
    """Logits, loss and every gradient in fp32: only the order of sums differs.

    Gradients also by norm, for many are far below 1: a product of 64 to 8192 terms keeps 5 of float32's 7 digits.
    """
    torch.manual_seed(0)
    model = build(**SMALL, **VARIANTS[variant], kernels=Kernels(attention=attention))
    randomise(model)
    oracle = build_huggingface(ModelConfig(**SMALL, **VARIANTS[variant]), 224, 8192)
    weights = rename(model.state_dict(), "memory")
    assert weights.keys() == oracle.state_dict().keys()
    oracle.load_state_dict(weights)
    images, prediction = inputs(num_masked=num_masked)
    used = prediction.labels != UNUSED
    assert used.sum(1).tolist() == ([72, 74] if num_masked else [196, 196])
    loss = run(model, images, prediction)

    pixels = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    if num_masked:
        out = oracle(pixels, prediction.masked, labels=prediction.labels[used])
        oracle_loss = out.loss
    else:
        # theirs takes its labels at masked patches alone
        out = oracle(pixels, prediction.masked)
        oracle_loss = F.cross_entropy(out.logits.flatten(0, 1), prediction.labels.flatten())
    oracle_loss.backward()

    with torch.no_grad():
        logits = model.logits(images, prediction.masked)
        slots = model.logits(images, prediction.masked, prediction.predict_idx)
    expected = out.logits.detach()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slots[used], expected[prediction.masked] if num_masked else expected.flatten(0, 1))
    torch.testing.assert_close(loss, oracle_loss.detach(), atol=1e-5, rtol=0)
    ours, theirs = rename(gradients(model), "memory"), gradients(oracle)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        error = ours[name] - theirs[name]
        assert error.abs().max() <= 1e-5 and error.norm() <= 5e-5 * theirs[name].norm(), name


def test_an_unused_slot_weighs_nothing():
    """Its label is left out, so its gradient is zero and the sum is that of the slots in use."""
    torch.manual_seed(0)
    model = build(**TINY, image_size=(32, 32), num_outputs=50)
    randomise(model)
    images, prediction = inputs((32, 32), (8, 8), num_masked=20, num_words=50)
    labels = prediction.labels.clone()
    labels[0, 5:] = UNUSED
    loss_sum, num_correct = model(images, prediction.masked, prediction.predict_idx, labels)
    logits = model.logits(images, prediction.masked, prediction.predict_idx)
    used = labels != UNUSED
    torch.testing.assert_close(loss_sum, F.cross_entropy(logits[used], labels[used], reduction="sum"))
    assert num_correct == (logits.argmax(2) == labels).sum() and num_correct.dtype == torch.int64
    logits.retain_grad()
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert logits.grad is not None and not logits.grad[~used].any()
    nothing, _ = model(images, prediction.masked, prediction.predict_idx, torch.full_like(labels, UNUSED))
    assert nothing == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_last_block_on_slots_alone(variant):
    """Design D7: the same logits and gradients as running the last block for all tokens, under drop path too."""
    torch.manual_seed(0)
    model = build(**TINY, **VARIANTS[variant], image_size=(32, 32), num_outputs=50)
    randomise(model)
    images, prediction = inputs((32, 32), (8, 8), num_masked=20, num_words=50, batch=3)
    keep = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], [[2.0, 0.0, 1.5], [0.0, 1.5, 1.0]]])
    keep = keep.permute(2, 0, 1)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))

    slots = model.logits(images, prediction.masked, prediction.predict_idx, keep)
    weight = torch.randn_like(slots)
    (slots * weight).sum().backward()
    on_slots = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    whole = model.logits(images, prediction.masked, keep=keep)
    whole = whole.gather(1, prediction.predict_idx[:, :, None].expand(-1, -1, 50))
    (whole * weight).sum().backward()

    assert shapes == [(3, 20, 50), (3, 64, 50)]
    torch.testing.assert_close(slots, whole, atol=1e-5, rtol=1e-5)
    assert on_slots.keys() == gradients(model).keys()
    torch.testing.assert_close(on_slots, gradients(model), atol=1e-5, rtol=1e-5)


def test_masked_pixels_have_no_influence():
    torch.manual_seed(0)
    model = build(**TINY, image_size=(32, 32), num_outputs=50)
    randomise(model)
    images, prediction = inputs((32, 32), (8, 8), num_masked=20, num_words=50)
    hidden = prediction.masked.view(2, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)[..., None]
    logits = model.logits(images, prediction.masked)
    assert torch.equal(model.logits(torch.where(hidden, images + 10, images), prediction.masked), logits)
    assert not torch.equal(model.logits(torch.where(hidden, images, images + 10), prediction.masked), logits)


def test_drop_path():
    """A dropped branch leaves the residual alone; a kept one counts 1 / (1 - rate); each image has its own."""
    torch.manual_seed(0)
    model = build(**TINY, image_size=(32, 32), num_outputs=50)
    randomise(model)
    block = model.blocks[0]
    x, bias = torch.randn(4, 65, 32), model.rel_pos_bias()
    attn = block.gamma_1 * block.attn(block.norm1(x), bias, None)
    keep = torch.tensor([[0.0, 1.25, 1.0, 0.0], [0.0, 0.0, 1.0, 1.25]])
    after_attn = x + torch.tensor([0.0, 1.25, 1.0, 0.0])[:, None, None] * attn
    mlp = block.gamma_2 * block.mlp(block.norm2(after_attn))
    expected = after_attn + torch.tensor([0.0, 0.0, 1.0, 1.25])[:, None, None] * mlp
    out = block(x, bias, keep)
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[2], block(x, bias, None)[2])


def test_each_block_has_its_keep():
    """Without any branch the logits are those of the embedding: cls and positions do not mix."""
    torch.manual_seed(0)
    model = build(**TINY, **ABSOLUTE, image_size=(32, 32), num_outputs=50)
    randomise(model)
    images, prediction = inputs((32, 32), (8, 8), num_masked=20, num_words=50)
    x = model.embed(images, prediction.masked, model.mask_token.flatten())
    bare = model.lm_head(model.norm(x[:, 1:]))
    assert torch.equal(model.logits(images, prediction.masked, keep=torch.zeros(2, 2, 2)), bare)
    for block in range(2):
        keep = torch.zeros(2, 2, 2)
        keep[:, block] = 1
        assert not torch.allclose(model.logits(images, prediction.masked, keep=keep), bare)


def test_start():
    """The authors' initialisation: a normal of deviation 0.02 cut at 0.02 has 0.01079."""
    torch.manual_seed(0)
    model = build(width=384, depth=4, num_heads=6, mlp_width=1536, absolute_position=True, layer_scale=1e-5)
    cut_normal, large = 0.01079, ["patch_embed.proj.weight", "lm_head.weight", "pos_embed"]
    for i, block in enumerate(model.blocks, start=1):
        for weight in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert weight.std().item() == pytest.approx(cut_normal, rel=0.02)
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(cut_normal / math.sqrt(2 * i), rel=0.02)
            assert weight.abs().max() <= 0.02 / math.sqrt(2 * i)
        assert (block.gamma_1 == 1e-5).all() and (block.gamma_2 == 1e-5).all()
    parameters = dict(model.named_parameters())
    for name in large:
        assert parameters[name].std().item() == pytest.approx(cut_normal, rel=0.02)
    for name in ("cls_token", "mask_token"):
        assert parameters[name].std().item() == pytest.approx(cut_normal, rel=0.15)  # 384 numbers
    assert max(parameter.abs().max() for name, parameter in parameters.items() if parameter.ndim > 1) <= 0.02
    for name, parameter in parameters.items():
        if name.endswith(("bias", "bias_table")):
            assert not parameter.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name


def test_first_loss():
    """Of BEiT-B's width and vocabulary: logits deviate by 0.3, which lifts ln 8192 = 9.01 by 0.3**2 / 2."""
    torch.manual_seed(0)
    model = build(depth=2)
    images, prediction = inputs(num_masked=0)
    with torch.no_grad():
        logits = model.logits(images, prediction.masked)
        loss_sum, _ = model(images, prediction.masked, prediction.predict_idx, prediction.labels)
    assert logits.std().item() == pytest.approx(0.296, abs=0.01)
    assert loss_sum.item() / 392 == pytest.approx(math.log(8192) + 0.296**2 / 2, abs=0.05)


def test_a_rectangle():
    """Images of 24x40, patches of 4x8: cut as a convolution cuts them, and learnt from."""
    torch.manual_seed(0)
    model = build((24, 40), 50, **{**TINY, "patch_size": (4, 8)})
    randomise(model)
    images, prediction = inputs((24, 40), (6, 5), num_masked=12, num_words=50)
    pixels = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    projection = model.patch_embed.proj
    expected = F.conv2d(pixels, projection.weight, projection.bias, stride=(4, 8)).flatten(2).transpose(1, 2)
    tokens = model.embed(images, torch.zeros(2, 30, dtype=torch.bool), model.mask_token.flatten())
    torch.testing.assert_close(tokens[:, 1:], expected, atol=1e-5, rtol=1e-5)
    assert run(model, images, prediction).isfinite()
    assert all(grad.isfinite().all() and grad.any() for grad in gradients(model).values())


def test_normalisation_is_per_channel():
    colours: Any = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 4.0)}
    model = Beit(ModelConfig(**TINY), image_size=(4, 4), num_outputs=5, **colours, kernels=Kernels())
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 4, 4, 3)
    patches = model.patch_embed.patches(images).view(3, 16)
    torch.testing.assert_close(patches, torch.tensor([[-0.1], [0.0], [0.175]]).expand(3, 16))


def test_pixel_objective():
    """The error of the slots in use against the encoder's own input; labels only say which slots those are."""
    torch.manual_seed(0)
    model = build((32, 32), 48, "pixels", **TINY)
    randomise(model)
    images, prediction = inputs((32, 32), (8, 8), num_masked=20)
    labels = torch.where(torch.arange(20) < torch.tensor([[20], [13]]), 0, UNUSED)
    loss_sum, num_correct = model(images, prediction.masked, prediction.predict_idx, labels)
    assert torch.equal(num_correct, torch.tensor(0))
    patches = ((images / 255 - 0.5) / 0.5).view(2, 8, 4, 8, 4, 3).permute(0, 1, 3, 5, 2, 4).reshape(2, 64, 48)
    logits = model.logits(images, prediction.masked)
    used = [(0, prediction.predict_idx[0]), (1, prediction.predict_idx[1, :13])]
    expected = [(logits[image, idx] - patches[image, idx]).square().mean(1) for image, idx in used]
    torch.testing.assert_close(loss_sum, torch.cat(expected).sum(), atol=1e-5, rtol=1e-5)


# Dynamo makes an instance of torch.autograd.Function, which torch itself deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_whole():
    """No graph break; the values of eager. Drop path and slots are arguments, so that nothing recompiles."""
    torch.manual_seed(0)
    model = build((32, 32), 50, **TINY)
    randomise(model)
    images, prediction = inputs((32, 32), (8, 8), num_masked=20, num_words=50)
    arguments = images, prediction.masked, prediction.predict_idx, prediction.labels, torch.ones(2, 2, 2)
    loss, num_correct = model(*arguments)
    loss.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    # without code generation: the question is whether forward and backward trace, not what the compiler makes of them
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_loss, compiled_correct = compiled(*arguments)
    compiled_loss.backward()
    torch.testing.assert_close((compiled_loss, compiled_correct), (loss, num_correct), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(gradients(model), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16():
    """Under autocast, as on a GPU: float32 residual stream and loss, gradients near those of float32."""
    torch.manual_seed(0)
    model = build((32, 32), 50, **TINY)
    images, prediction = inputs((32, 32), (8, 8), num_masked=20, num_words=50)
    loss = run(model, images, prediction)
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(model, images, prediction)
    assert rounded.dtype == torch.float32
    # bfloat16 has 8 bits: 2**-8 = 0.004 a rounding
    assert rounded.item() == pytest.approx(loss.item(), rel=0.004)
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() <= 0.05 * expected[name].norm(), name


def test_errors():
    model = build((32, 32), 50, **TINY)
    images, prediction = inputs((32, 16), (8, 4), num_masked=5, num_words=50)
    with pytest.raises(ValueError, match=r"want shape \[B, 32, 32, 3\]; got \[2, 32, 16, 3\]"):
        model.logits(images, prediction.masked)
    with pytest.raises(ValueError, match="num_outputs of the pixel objective is 48"):
        build((32, 32), 50, "pixels", **TINY)
