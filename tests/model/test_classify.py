"""The classifier: its loss against soft targets that are written out, its start, its feature, its parts' rates."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbeit.config.running import Kernels
from fastbeit.config.sections import ModelConfig, OptimConfig
from fastbeit.model.classify import ClassHead, Classifier
from fastbeit.train.optim import make_optimizer, parameter_groups, set_learning_rate

TINY = ModelConfig(width=32, depth=2, num_heads=2, mlp_width=64, patch_size=(8, 8), relative_position="per_block")
PIXELS: dict[str, Any] = dict(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad.double()


def classifier(model: ModelConfig = TINY, **options) -> Classifier:
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(image_size=(32, 32), num_classes=5, kernels=Kernels(), **PIXELS) | options
    return Classifier(model, **arguments)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_mixed_images_is_that_of_soft_targets(backend, smoothing, device):
    torch.manual_seed(0)
    head = ClassHead(32, 7, smoothing, Kernels(loss=backend)).to(device)
    exact = ClassHead(32, 7, smoothing, Kernels(loss="reference")).double().to(device)
    exact.load_state_dict(head.state_dict())
    x = torch.randn(6, 32, device=device, requires_grad=True)
    labels, others = torch.tensor([0, 1, 2, 3, 4, 6]).to(device), torch.tensor([6, 4, 2, 3, 1, 0]).to(device)
    share = torch.tensor([1.0, 0.7, 0.7, 0.0, 0.5, 0.25], device=device)
    loss, num_correct = head(x, labels, others, share)
    loss.backward()

    y = x.detach().double().requires_grad_()
    logits = F.linear(y, exact.weight, exact.bias)
    own, other = (F.one_hot(of, 7).double() for of in (labels, others))
    target = share[:, None] * own + (1 - share[:, None]) * other
    target = target * (1 - smoothing) + smoothing / 7
    wanted = F.cross_entropy(logits, target, reduction="sum")
    wanted.backward()
    # float32 sums of 32 products
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(x), y.grad, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(head.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(gradient(mine), theirs.grad, rtol=1e-4, atol=1e-6)
    assert num_correct == (logits.argmax(1) == labels).sum()


def test_no_logits_of_many_classes_are_kept_for_the_backward():
    """21,841 of the whole ImageNet."""
    head, kept = ClassHead(8, 21_841, 0.1, Kernels(loss="reference")), []
    x = torch.randn(256, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        head(x, torch.arange(256))[0].backward()
    assert max(kept) <= head.weight.numel() < 256 * 21_841


def test_the_feature_is_the_mean_of_patches_or_the_cls_token():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    for pooling, missing in (("mean", "norm.weight"), ("cls", "fc_norm.weight")):
        model = classifier(pooling=pooling)
        assert missing not in model.state_dict()
        pixels = model.patch_embed.pixels(images)
        torch.testing.assert_close(pixels, (images / 255 - torch.tensor(PIXELS["mean"])) / torch.tensor(PIXELS["std"]))
        masked = torch.zeros(3, 16, dtype=torch.bool)
        x = model.encode(model.embed(images, masked, torch.zeros(32)))
        wanted = F.layer_norm(x[:, 1:].mean(1) if pooling == "mean" else x[:, 0], (32,), eps=1e-6)
        torch.testing.assert_close(model.features(pixels), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.logits(images), F.linear(wanted, model.head.weight, model.head.bias))


def test_absolute_positions_are_added():
    model = classifier(TINY.model_copy(update={"absolute_position": True, "relative_position": "none"}))
    pixels = torch.randn(2, 32, 32, 3)
    before = model.features(pixels)
    with torch.no_grad():
        assert model.pos_embed is not None
        model.pos_embed.add_(torch.randn_like(model.pos_embed))
    assert not torch.allclose(before, model.features(pixels))


def test_it_starts_as_the_authors_do():
    model = classifier(
        ModelConfig(width=256, depth=3, num_heads=4, mlp_width=1024, relative_position="per_block"),
        image_size=(32, 32),
        num_classes=100,
    )
    std = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert std["blocks.0.mlp.fc1.weight"] == pytest.approx(0.02, rel=0.02)
    assert std["blocks.2.mlp.fc2.weight"] == pytest.approx(0.02 / 6**0.5, rel=0.02)
    assert std["head.weight"] == pytest.approx(0.02e-3, rel=0.05)
    # uniform in 1 / sqrt(fan in), as PyTorch's convolution
    weight = model.patch_embed.proj.weight
    assert weight.abs().max() <= 768**-0.5 and std["patch_embed.proj.weight"] == pytest.approx(
        (3 * 768) ** -0.5, rel=0.02
    )
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias_table"))


def test_layers_learn_at_their_rates():
    """28 groups for BEiT-B at 0.65; the stem at 0.65 ** 13 = 0.0037 (the authors' code)."""
    with torch.device("meta"):
        model = classifier(ModelConfig(relative_position="per_block", layer_scale=0.1), image_size=(224, 224))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05, layer_decay=0.65)
    assert len(groups) == 28
    scales = {names[parameter]: group["scale"] for group in groups for parameter in group["params"]}
    assert scales["cls_token"] == scales["patch_embed.proj.weight"] == pytest.approx(0.65**13)
    assert scales["blocks.0.attn.qkv.weight"] == pytest.approx(0.65**12)
    assert scales["blocks.11.attn.relative_position_bias_table"] == pytest.approx(0.65)
    assert scales["fc_norm.weight"] == scales["head.weight"] == 1
    decays = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decays["cls_token"] == decays["blocks.3.gamma_1"] == decays["head.bias"] == 0
    assert decays["head.weight"] == decays["blocks.0.attn.relative_position_bias_table"] == 0.05


def test_a_rate_reaches_each_group_by_its_scale():
    optimizer = make_optimizer(classifier(), OptimConfig(), layer_decay=0.5)
    set_learning_rate(optimizer, 8.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1, 2, 4, 8]
