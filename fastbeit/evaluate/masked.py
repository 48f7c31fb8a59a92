"""What a model knows of images that it was not trained on: loss and accuracy, and what they are worth.

The yardstick is the unigram baseline: the cross-entropy of the images' tokens under the histogram of the training
tokens, the loss of a model that sees no image.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastbeit import masking
from fastbeit.config.pretrain import Config
from fastbeit.data.batch import Batch
from fastbeit.data.index.reader import Index
from fastbeit.data.loader import make_loader
from fastbeit.engine.ranks import World
from fastbeit.model.beit import Beit
from fastbeit.tokenizer.protocol import Tokenizer
from fastbeit.tokenizer.quality import word_usage
from fastbeit.tokenizer.source import visual_tokens
from fastbeit.train.stop import Stop
from fastbeit.train.together import together

MAX_BATCH = 256  # images a rank looks at together
SMOOTHING = 0.5  # added to each word's count, so that an unseen word costs much but not everything


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted patches of some images."""

    loss: float  # nats (tokens), or squared error (pixels)
    accuracy: float  # share of patches whose visual token is the most likely one; 0 for pixels
    num_predicted: int
    histogram: Tensor  # [V] int64: how often each word stands in all patches of the images; empty for pixels

    @property
    def words_in_use(self) -> int:
        return int((self.histogram > 0).sum())


def held_out_seed(config: Config) -> int:
    """Another seed than the run's: crops and masks that training never saw, even of training images."""
    return config.seed + 1


def batches_of(
    config: Config, index: Index, world: World, num_crops: int, token_size: tuple[int, int] | None, seed: int
) -> Iterator[Batch]:
    """At least `num_crops` crops, filled up to whole batches; each image as often as any other, but for one."""
    per_rank = min(MAX_BATCH, math.ceil(num_crops / world.size))
    return iter(
        make_loader(
            config.data.model_copy(update={"tail": "wrap", "num_crops": 0, "num_workers": 0}),
            index,
            token_size=token_size,
            batch_size=per_rank * world.size,
            seed=seed,
            rank=world.rank,
            world_size=world.size,
            first_step=0,
            num_steps=math.ceil(num_crops / (per_rank * world.size)),
        )
    )


@torch.no_grad()
def evaluate(
    config: Config, model: Beit, tokenizer: Tokenizer | None, index: Index, world: World, num_crops: int, stop: Stop
) -> Evaluation:
    """Loss and accuracy on unseen crops of `index`; all ranks must call it. Drop path is off.

    Raises:
        StopWanted: a rank was asked to stop before the end; on all ranks.
        RunError: the images are gone (66), or none is valid; on all ranks.
    """
    token_size = tokenizer.view_size(config.grid) if tokenizer else None
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    histogram = torch.zeros(tokenizer.vocab_size if tokenizer else 0, dtype=torch.int64, device=world.device)
    num_predicted, seed = 0, held_out_seed(config)
    rule = replace(masking.rule_of(config), seed=seed)
    with together(world, stop):
        for batch in batches_of(config, index, world, num_crops, token_size, seed):
            samples = batch.epoch.to(world.device), batch.sample.to(world.device)
            slots = masking.draw(rule, *samples)
            tokens = visual_tokens(tokenizer, batch, world.device)
            labels = masking.label(slots, None if tokens is None else tokens.gather(1, slots.predict_idx))
            loss_sum, num_correct = model(batch.images.to(world.device), slots.masked, slots.predict_idx, labels)
            sums += torch.stack([loss_sum.double(), num_correct.double()])
            num_predicted += int((labels != masking.UNUSED).sum())
            if tokens is not None:
                histogram += torch.bincount(tokens.flatten(), minlength=len(histogram))
    loss, correct, count, *words = world.sum([*sums.tolist(), num_predicted, *histogram.tolist()])
    return Evaluation(loss / max(count, 1), correct / max(count, 1), int(count), torch.tensor(words).long())


def token_histogram(config: Config, tokenizer: Tokenizer, index: Index, world: World, num_crops: int) -> Tensor:
    """[V] int64: how often each word stands in crops that training draws, on this rank."""
    batches = batches_of(config, index, world, num_crops, tokenizer.view_size(config.grid), config.seed)
    views = (batch.token_images for batch in batches if batch.token_images is not None)
    return word_usage(tokenizer, views).histogram


def unigram_baseline(training: Tensor, held_out: Tensor) -> float:
    """Cross-entropy in nats of the words of one histogram [V] under the smoothed frequencies of another."""
    probability = (training + SMOOTHING) / (training + SMOOTHING).sum()
    return float(-(held_out * probability.log()).sum() / held_out.sum())
