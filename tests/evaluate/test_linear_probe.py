"""The linear probe, beside the same by hand in float64."""

import math

import numpy as np
import torch

from fastbeit.evaluate import linear_probe
from fastbeit.evaluate.linear_probe import Heads, Recipe, accuracy, train_heads

CPU = torch.device("cpu")
N, BLOCKS, WIDTH, CLASSES = 50, 3, 6, 4
RECIPE = Recipe(epochs=3, lr=0.05, batch_size=16)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    values = torch.randn(N, BLOCKS, WIDTH, generator=random, dtype=torch.float64)
    return values, torch.randint(CLASSES, (N,), generator=random)


def by_hand(values: np.ndarray, rows: np.ndarray, recipe: Recipe, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One block's head: gradients of the softmax, and AdamW, written out."""
    random = torch.Generator().manual_seed(seed)
    weight = 0.01 * torch.randn(CLASSES, WIDTH, generator=random, dtype=torch.float64).numpy()
    parameters = [weight, np.zeros(CLASSES)]
    moments = [[np.zeros_like(one), np.zeros_like(one)] for one in parameters]
    step, num_steps = 0, recipe.epochs * math.ceil(N / recipe.batch_size)
    for _ in range(recipe.epochs):
        order = torch.randperm(N, generator=random).numpy()
        for start in range(0, N, recipe.batch_size):
            x, y = values[order[start : start + recipe.batch_size]], rows[order[start : start + recipe.batch_size]]
            logits = x @ parameters[0].T + parameters[1]
            share = np.exp(logits - logits.max(1, keepdims=True))
            error = (share / share.sum(1, keepdims=True) - np.eye(CLASSES)[y]) / len(y)
            lr = recipe.lr * (1 + math.cos(math.pi * step / num_steps)) / 2
            step += 1
            for i, gradient in enumerate((error.T @ x, error.sum(0))):
                first, second = moments[i]
                first[:] = 0.9 * first + 0.1 * gradient
                second[:] = 0.999 * second + 0.001 * gradient**2
                update = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
                parameters[i] = parameters[i] * (1 - lr * recipe.weight_decay) - lr * update
    return parameters[0], parameters[1]


def test_every_block_has_the_head_that_it_would_have_alone():
    values, rows = data()
    # a decay that shows
    recipe = Recipe(epochs=3, lr=0.05, batch_size=16, weight_decay=0.5)
    heads = train_heads(values, rows, CLASSES, recipe, seed=7, device=CPU)
    for block in range(BLOCKS):
        weight, bias = by_hand(values[:, block].numpy(), rows.numpy(), recipe, seed=7)
        np.testing.assert_allclose(heads.weight[block], weight, atol=1e-10)
        np.testing.assert_allclose(heads.bias[block], bias, atol=1e-10)


def test_a_seed_is_a_start_and_an_order():
    values, rows = data()
    first, again, other = (train_heads(values, rows, CLASSES, RECIPE, seed, CPU).weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_accuracy_is_counted_by_block(monkeypatch):
    """Ten classes: the logits of image i are those of one-hot features, so that the answer can be read off."""
    monkeypatch.setattr(linear_probe, "TOP", 2)
    heads = Heads(torch.stack([torch.eye(10), -torch.eye(10)]), torch.linspace(0, 0.1, 10).expand(2, -1))
    values = torch.eye(10)[:, None].expand(-1, 2, -1)
    # block 0 says i first and then 9 (or 8, of image 9); block 1 never i, but 9 and 8 (or 7)
    rows = torch.tensor([0, 1, 9, 3, -1, 8, 6, 7, 8, 9])
    found = accuracy(heads, values, rows, batch_size=3)
    assert found.tolist() == [[0.7, 0.8], [0.1, 0.2]]
