"""Forward and backward beside others' code, on this CPU: ratios, not rates; float32, the same weights and masks.

    Hugging Face     transformers' BeitForMaskedImageModeling, eager attention, as it comes
    official style   the authors' forward restated: scores, bias and probabilities in memory, all patches through all
                     blocks, the head on masked rows
    timm             timm's Beit, which has no masks, with our mask token, head and loss around it

Nobody is timed whose loss differs from ours, and nobody drops paths. Turns are interleaved, a time is the process's
(`process_time`), and what is said is the median over rounds of each round's ratio, with the ratios' quartiles: a ratio
of 1 between them is no difference. What a CPU shows of attention and of fused kernels is not what a GPU shows.
"""

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import Row, first_line
from benchmarks.step.drawn import draw_inputs
from benchmarks.step.rates import VOCAB_SIZE
from benchmarks.step.variants import VARIANTS, Case
from fastbeit.config.pretrain import Config
from fastbeit.engine.ranks import World
from fastbeit.masking import UNUSED
from fastbeit.model.beit import make_beit

MAX_DIFFERENCE = 1e-4  # of a loss of 9: sums in another order
OURS = "ours"

Loss = Callable[[], Tensor]  # the mean over masked patches


class Task:
    """A model, and images with what is to be predicted of them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.manual_seed(0)
        self.model: Any = make_beit(config, VOCAB_SIZE)
        # the table and biases start as zeros, and all so small that no loss would tell who leaves something out
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.add_((1.0 if name.endswith("_table") else 0.05) * torch.randn_like(parameter))
        images, self.masked, self.slots, self.labels, _ = draw_inputs(config, World(0, 1, torch.device("cpu")), 0)
        self.images = images
        # in the order of patches, as others index with a mask
        self.words = self.labels[self.labels != UNUSED]

    def pixels(self) -> Tensor:
        """[B, 3, height, width], normalised."""
        mean, std = (torch.tensor(of).view(3, 1, 1) for of in (self.config.data.mean, self.config.data.std))
        return (self.images.permute(0, 3, 1, 2) / 255 - mean) / std

    def ours(self) -> Tensor:
        loss_sum, _ = self.model(self.images, self.masked, self.slots, self.labels)
        return loss_sum / len(self.words)


def huggingface(task: Task) -> Loss:
    from benchmarks.huggingface import build_huggingface
    from fastbeit.weights.huggingface import rename

    theirs = build_huggingface(task.config.model, task.config.data.image_size[0], VOCAB_SIZE)
    theirs.load_state_dict(rename(task.model.state_dict(), "memory"))
    return lambda: theirs(task.pixels(), task.masked, labels=task.words).loss


def official_style(task: Task) -> Loss:
    model = task.model

    def loss() -> Tensor:
        proj = model.patch_embed.proj
        x = embedded(model, F.conv2d(task.pixels(), proj.weight, proj.bias, stride=proj.weight.shape[2:]), task)
        table, index = model.rel_pos_bias.relative_position_bias_table, model.rel_pos_bias.relative_position_index
        bias = table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous()
        for block in model.blocks:
            x = x + block.gamma_1 * attend(block.attn, block.norm1(x), bias)
            hidden = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
            x = x + block.gamma_2 * hidden
        return head_loss(model, x, task)

    return loss


def attend(attn: Any, x: Tensor, bias: Tensor) -> Tensor:
    """softmax(scale q k^T + bias) v, step by step."""
    qkv_bias = torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias))
    q, k, v = F.linear(x, attn.qkv.weight, qkv_bias).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q * q.shape[3] ** -0.5 @ k.transpose(2, 3) + bias
    return attn.proj((scores.softmax(3) @ v).transpose(1, 2).flatten(2))


def embedded(model: Any, patches: Tensor, task: Task) -> Tensor:
    """[B, S, D]: the cls token, then patches [B, D, h, w], the mask token in the place of masked ones."""
    x, masked = patches.flatten(2).transpose(1, 2), task.masked[:, :, None].to(patches.dtype)
    x = x * (1 - masked) + model.mask_token * masked
    return torch.cat((model.cls_token.expand(len(x), -1, -1), x), 1)


def head_loss(model: Any, x: Tensor, task: Task) -> Tensor:
    """All tokens are normalised, masked ones go to the head, whose logits are in memory."""
    x = model.norm(x)[:, 1:][task.masked]
    return F.cross_entropy(F.linear(x, model.lm_head.weight, model.lm_head.bias), task.words)


def timm(task: Task) -> Loss:
    from timm.models.beit import Beit as Theirs  # pyright: ignore[reportMissingImports]

    model, settings = task.model, task.config.model
    theirs = Theirs(
        img_size=task.config.data.image_size,
        patch_size=settings.patch_size,
        num_classes=0,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.num_heads,
        mlp_ratio=settings.mlp_width / settings.width,
        init_values=settings.layer_scale,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
    )
    named = {name: x for name, x in model.state_dict().items() if name in theirs.state_dict()}
    theirs.load_state_dict(named, strict=False)

    def loss() -> Tensor:
        patches = theirs.patch_embed(task.pixels()).transpose(1, 2)[..., None]
        x, bias = embedded(model, patches, task), theirs.rel_pos_bias()
        for block in theirs.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        return head_loss(model, x, task)

    return loss


PEERS: dict[str, tuple[str, Callable[[Task], Loss]]] = {
    "Hugging Face": ("transformers", huggingface),
    "official style": ("torch", official_style),
    "timm": ("timm", timm),
}


def rows(size: str, num_images: int, num_rounds: int, settings: tuple[str, ...] = ()) -> Iterator[Row]:
    """What each takes, over what ours takes; who is missing or wrong says so."""
    case = Case(size, VARIANTS["reference"], num_images, settings=("engine.device=cpu", *settings))
    task = Task(case.config)
    losses: dict[str, Loss] = {OURS: task.ours}
    expected, left_out = task.ours().item(), {}
    for who, (module, make) in PEERS.items():
        if find_spec(module) is None:
            left_out[who] = f"{module} is not installed"
            continue
        try:
            losses[who] = make(task)
            got = losses[who]().item()
        # another version's names: the others are timed all the same
        except Exception as err:
            left_out[who] = first_line(err)
            losses.pop(who, None)
            continue
        if not abs(got - expected) <= MAX_DIFFERENCE:
            yield dict(case=f"{size}, {who}", wrong=f"its loss is {got:.5f}, and ours {expected:.5f}")
            del losses[who]
    yield from (dict(case=f"{size}, {who}", left_out=why) for who, why in left_out.items())
    yield from compared(size, num_images, losses, num_rounds)


def compared(size: str, num_images: int, losses: dict[str, Loss], num_rounds: int) -> Iterator[Row]:
    seconds: dict[str, list[float]] = {who: [] for who in losses}
    for number in range(1 + num_rounds):
        for who, loss in losses.items():
            began = time.process_time()
            loss().backward()
            # the first round warms up
            if number:
                seconds[who].append(time.process_time() - began)
    for who, taken in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(taken, seconds[OURS], strict=True)]
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row: Row = dict(case=f"{size}, {who}, {num_images} image(s)", who=who, images=num_images, rounds=num_rounds)
        yield row | dict(cpu_ms=1e3 * median(taken), times=middle, low=low, high=high)
