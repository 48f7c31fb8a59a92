"""k-NN on features, beside scikit-learn's."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastbeit.evaluate import knn
from fastbeit.evaluate.knn import TEMPERATURE, K, Neighbours, joined, nearest, num_right, votes

CPU = torch.device("cpu")
CLASSES = 7


def points(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Around a centre a class, of any length; near enough that neighbours disagree."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((CLASSES, 16))
    rows = random.integers(0, CLASSES, number)
    values = (centres[rows] + 1.5 * random.standard_normal((number, 16))) * random.uniform(0.1, 9, (number, 1))
    return torch.tensor(values, dtype=torch.float32), torch.tensor(rows)


def sklearn_scores(train, rows, queries, k):
    """[m, C] shares of the votes."""
    weights: Any = lambda distance: np.exp((1 - distance) / TEMPERATURE)  # noqa: E731
    theirs = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute", weights=weights)
    return theirs.fit(train.double().numpy(), rows.numpy()).predict_proba(queries.double().numpy())


@pytest.mark.parametrize("portions", [(256, 1 << 16), (7, 10)])
@pytest.mark.parametrize("num_train, k", [(200, K), (200, 1), (12, K)])
def test_votes_are_those_of_scikit_learn(monkeypatch, portions, num_train, k):
    """Also portion by portion, and with fewer images than neighbours are asked for."""
    monkeypatch.setattr(knn, "QUERIES", portions[0])
    monkeypatch.setattr(knn, "TRAIN", portions[1])
    (train, rows), (queries, wanted) = points(num_train, 1), points(60, 2)
    rows[:CLASSES] = torch.arange(CLASSES)
    found = nearest(train, rows, queries, k, CPU)
    assert found.cosine.shape == (60, min(k, num_train))
    scores = votes(found, CLASSES)
    theirs = sklearn_scores(train, rows, queries, min(k, num_train))
    np.testing.assert_allclose(scores / scores.sum(1, keepdim=True), theirs, atol=1e-4)
    # of classes without a vote nobody says which comes first
    first, among = num_right(found, wanted, CLASSES)
    assert first == (theirs.argmax(1) == wanted.numpy()).sum() and first < among <= 60


def test_neighbours_of_several_parts_are_those_of_the_whole():
    (train, rows), (queries, _) = points(90, 1), points(20, 2)
    whole = nearest(train, rows, queries, K, CPU)
    parts = [nearest(train[part], rows[part], queries, K, CPU) for part in (slice(0, 5), slice(5, 5), slice(5, 90))]
    again = joined(parts, K)
    torch.testing.assert_close(again.cosine, whole.cosine)
    assert torch.equal(again.rows, whole.rows)


def test_a_class_that_cannot_be_right_counts_as_wrong():
    found = Neighbours(torch.tensor([[0.9, 0.1], [0.8, 0.7]]), torch.tensor([[1, 0], [0, 1]]))
    assert num_right(found, torch.tensor([1, -1]), 2) == (1, 1)
