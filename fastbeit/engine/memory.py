"""How much memory a step of a training of the encoder takes on one rank's device: a formula of the configuration alone.

    peak = static + micro-batch * (saved + temporary)

static: weights, their average, gradients, moments, buckets, batches; of these ZeRO shares out some, and moves some to
the host (zero_memory.py). saved: what the forward of an image leaves to the backward.
temporary: the most that the backward of an image has beside it. Letters as in model/vit.py; b bytes a value in
`engine.precision`. A block, run eagerly, saves of each token (a compiled one saves less):

    8 D + 8 D b + 2 F b + 4 H        its input and that of the MLP in float32, from both normalised copies; q, k, v;
                                     outputs of attention, of both branches; the MLP's two layers; a log-sum a head

With `engine.checkpoint_blocks` it saves its input, 4 D, and one block at a time has the rest. The last block goes on
after its attention with the M slots alone. What is saved is counted in tests/engine/test_memory.py.
"""

import math
from dataclasses import dataclass

from fastbeit.config.finetune import VitConfig
from fastbeit.config.sections import Size
from fastbeit.engine.zero_memory import WEIGHT_BYTES, Held, held

BATCHES = 2  # on the device: the next is copied during a step
WORKSPACE_BYTES = 64 * 2**20  # that cuBLAS takes on Hopper, on older cards less
BIAS_ALIGNMENT = 16  # values that a row of the relative-position bias is padded to
RESERVE = 0.05  # of the card: what the allocator cannot join, and what the frozen tokenizer leaves in its cache
# of a card's memory: what the driver keeps for itself, the CUDA context, and OpenAI's tokenizer; estimates
USABLE, TAKEN_BYTES = 0.98, 2**30
SMALL = 32  # images a micro-batch; with fewer, recomputing blocks may cost less time than small products. Not measured


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank's device, but `host`."""

    weights: int  # with ZeRO-3 this rank's share, and those that are gathered
    gradients: int
    optimizer: int  # moments; with ZeRO this rank's share, its master weights and DeepSpeed's buckets too
    batches: int
    workspace: int  # of the loss, the bias and cuBLAS, and the weights in the precision of products
    saved: int  # an image of a micro-batch
    temporary: int  # likewise
    average: int = 0  # of weights, where one is kept
    host: int = 0  # of this rank, in the host's memory: what ZeRO offloads, with weights also their average

    @property
    def static(self) -> int:
        return self.weights + self.average + self.gradients + self.optimizer + self.batches + self.workspace

    @property
    def absent(self) -> int:
        """What is not there in a forward and backward without optimizer and batches."""
        return self.optimizer + self.batches

    def peak(self, num_images: int) -> int:
        """With micro-batches of so many images."""
        return self.static + num_images * (self.saved + self.temporary)


def footprint(
    config: VitConfig, *, num_outputs: int, token_size: Size | None, num_ranks: int, itemsize: int
) -> Footprint:
    """
    Args:
        num_outputs: V, or P where pixels are regressed.
        token_size: height and width of the token view; None: batches have none.
        itemsize: b, 2 or 4.
    """
    num_weights = count_weights(config, num_outputs)
    rank = _held(config, num_weights, num_outputs, num_ranks, itemsize)
    average = _average(config, WEIGHT_BYTES * num_weights, num_ranks)
    # it lies where the weights lie that it follows
    average_on_host = average if config.engine.offload == "weights" else 0
    return Footprint(
        weights=rank.weights,
        gradients=rank.gradients,
        optimizer=rank.optimizer,
        batches=BATCHES * config.optim.batch_size // num_ranks * _batch_bytes(config, token_size),
        workspace=_workspace(config, num_weights, num_outputs, itemsize),
        saved=_saved(config, itemsize),
        temporary=max(_temporary(config, itemsize), _logits(config, num_outputs, itemsize)),
        average=average - average_on_host,
        host=rank.host + average_on_host,
    )


def expected_room(memory_gib: int) -> int:
    """Bytes that a step will find on a card that nobody else uses."""
    return int((USABLE - RESERVE) * memory_gib * 2**30) - TAKEN_BYTES


def fewest(images: int, footprint: Footprint, room: int) -> int:
    """The least number of micro-batches whose predicted peak has room; as many as images where none has."""
    counts = [count for count in range(1, images + 1) if images % count == 0]
    return next((count for count in counts if footprint.peak(images // count) <= room), images)


def count_weights(config: VitConfig, num_outputs: int) -> int:
    """Parameters of the model, LayerNorms and biases included."""
    model = config.model
    D, F, S = model.width, model.mlp_width, config.num_patches + 1
    (down, across), (height, width) = config.grid, model.patch_size
    table = ((2 * down - 1) * (2 * across - 1) + 3) * model.num_heads
    tables = {"shared": 1, "per_block": model.depth, "none": 0}[model.relative_position]
    scales = 2 * D if model.layer_scale else 0
    block = 4 * D * D + 3 * D + 2 * D * F + F + D + 4 * D + scales
    ends = (3 * height * width + 1) * D + 2 * D + S * D * model.absolute_position + 2 * D + (D + 1) * num_outputs
    return model.depth * block + tables * table + ends


def _held(config: VitConfig, num_weights: int, num_outputs: int, num_ranks: int, itemsize: int) -> Held:
    """What there is of the weights on a rank, without their average."""
    num_moments = _num_moments(config, num_weights)
    if config.engine.name != "deepspeed":
        # DDP's buckets are the gradients
        return Held(WEIGHT_BYTES * num_weights, WEIGHT_BYTES * num_weights, WEIGHT_BYTES * num_moments, 0)
    return held(
        config.engine,
        num_weights=num_weights,
        num_moments=num_moments,
        largest=config.model.width * max(num_outputs, config.model.mlp_width),
        num_ranks=num_ranks,
        itemsize=itemsize,
    )


def _num_moments(config: VitConfig, num_weights: int) -> int:
    """Two a weight; Muon has one of the blocks' matrices."""
    D, F = config.model.width, config.model.mlp_width
    is_muon = config.optim.name == "muon"
    return 2 * num_weights - is_muon * config.model.depth * (4 * D * D + 2 * D * F)


def _average(config: VitConfig, weights: int, num_ranks: int) -> int:
    """Bytes of a rank's part of the averaged weights, wherever it lies."""
    if config.optim.ema_decay is None:
        return 0
    is_shared = config.engine.name == "deepspeed" and config.engine.zero_stage == 3
    return weights // num_ranks if is_shared else weights


def _batch_bytes(config: VitConfig, token_size: Size | None) -> int:
    """Both views of an image in bytes, and of the numbers of a step those that count: slots, labels, masked patches.

    Of images that are classified the pixels, of all a rank's images of a step at once.
    """
    pixels = 3 * math.prod(config.data.image_size)
    if config.objective == "classes":
        # once for both batches: normalised, and mixed
        return pixels + 2 * 4 * pixels // BATCHES
    views = pixels + (3 * math.prod(token_size) if token_size else 0)
    return views + 3 * 8 * config.num_slots + config.num_patches


def _bias(config: VitConfig) -> int:
    """Values of one expanded table of relative positions."""
    S = config.num_patches + 1
    padded = -(-S // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    return 0 if config.model.relative_position == "none" else config.model.num_heads * S * padded


def _workspace(config: VitConfig, num_weights: int, num_outputs: int, itemsize: int) -> int:
    loss = WEIGHT_BYTES * config.model.width * num_outputs if config.objective != "pixels" else 0
    copies = itemsize * num_weights if itemsize < WEIGHT_BYTES else 0
    # a block's own in the precision of products; tables in float32, and their gradients
    num_tables = config.model.depth if config.model.relative_position == "per_block" else 1
    biases = _bias(config) * (itemsize * config.model.depth + 2 * 4 * num_tables)
    return loss + copies + biases + WORKSPACE_BYTES


def _saved(config: VitConfig, b: int) -> int:
    """Of an image: all that autograd keeps between its forward and its backward, at most."""
    model = config.model
    D, L, S, M = model.width, model.depth, config.num_patches + 1, config.num_slots
    before, after = _halves(config, b)
    # the attention's output at the slots, and which they are
    gathered = 0 if config.objective == "classes" else M * (b * D + 8)
    head = config.num_predictions * (4 * D + b * D + _objective(config))
    last = S * before + M * after + gathered + head + _pixels(config, b)
    if config.engine.checkpoint_blocks:
        # inputs of the blocks before the one that is computed again: the last, or the one before it
        inputs = S * 4 * D
        return max((L - 1) * inputs + last, (L - 2) * inputs + S * (before + after) if L > 1 else 0)
    return (L - 1) * S * (before + after) + last


def _halves(config: VitConfig, b: int) -> tuple[int, int]:
    """What a block saves of a token up to its attention's output, and after it."""
    D, F, H = config.model.width, config.model.mlp_width, config.model.num_heads
    branch = b * D if config.model.layer_scale else 0
    norm = 4 * D + 2 * 4 + b * D  # the input, its mean and deviation, and the output as the product takes it
    attention = 3 * b * D + b * D + 4 * H
    return norm + attention, branch + norm + 2 * b * F + branch


def _objective(config: VitConfig) -> int:
    """Of a slot: for pixels the errors in float32; the loss of tokens keeps a gradient instead."""
    return 0 if config.objective != "pixels" else 4 * 3 * math.prod(config.model.patch_size)


def _pixels(config: VitConfig, b: int) -> int:
    """Of an image that is classified: its normalised pixels as the product of its patches takes them."""
    return b * 3 * math.prod(config.data.image_size) if config.objective == "classes" else 0


def _logits(config: VitConfig, num_outputs: int, b: int) -> int:
    """Of an image, at most: the loss takes them by chunks, on a GPU as large as 1/64 of its memory."""
    return b * config.num_predictions * num_outputs if config.objective != "pixels" else 0


def _temporary(config: VitConfig, b: int) -> int:
    """Of an image: gradients of the residual stream and of what is widest in a block's backward."""
    D, F, S = config.model.width, config.model.mlp_width, config.num_patches + 1
    # q, k and v come as three, and go to their product as one; the fused backward gives the bias's for each image
    attention = S * 6 * b * D + b * _bias(config)  # relative_attention's workspace is as large
    mlp = S * (4 * D + 2 * b * F)
    return S * 4 * D + max(attention, mlp)
