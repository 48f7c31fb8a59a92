"""A dVAE that can be trained from: both ends solved in closed form, what lies between random.

From random weights a short training leaves most words unused. Here the words start as the k-means of the colours of
patch quarters; the encoder's last convolution is the least-squares map from its random features to those colours, and
the decoder's is the one from its random features back to pixels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbeit.data.progress import reported
from fastbeit.tokenizer.dvae import Conv2d, Decoder, Encoder, one_hot, to_mapped

SHARPNESS = 3.0  # squared distance to a word, in units of the mean one to the nearest, to nats
RIDGE = 1e-2  # of the mean variance: large weights of opposite sign would not survive the first steps of training
ROUNDS = 15  # of k-means: then few points still change their word
CHUNK = 4096  # points whose distances to all words are held at once


@torch.no_grad()
def solve_both_ends(encoder: Encoder, decoder: Decoder, images: list[Tensor], generator: torch.Generator) -> None:
    """Set the convolutions next to the words, and the decoder's last one, in place.

    Args:
        images: uint8 [B, h, w, 3] each; better many: their patches are what the words are chosen from.
        generator: on the images' device.
    """
    head, tail, embedding = _conv(encoder, "output.conv"), _conv(decoder, "output.conv"), _conv(decoder, "input")
    stride, vocab_size = encoder.arch.stride, encoder.arch.vocab_size

    mapped = reported(map(to_mapped, images), "start 2/5, colours of patches", len(images))
    weight, bias = _least_squares((_features(encoder, x), _rows(_quarters(x, stride))) for x in mapped)
    mapped = reported(map(to_mapped, images), "start 3/5, what the encoder makes of them", len(images))
    colours = torch.cat([_features(encoder, x) @ weight.T + bias for x in mapped])
    words = kmeans(colours, vocab_size, generator)
    # logits = -scale |colour - word|^2, less the term that all words share
    scale = SHARPNESS / nearest(colours, words)[0].mean().clamp(min=1e-8)
    head.w.copy_((2 * scale * words @ weight)[..., None, None])
    head.b.copy_(scale * (2 * words @ bias - words.square().sum(1)))

    projection = torch.randn(decoder.arch.n_init, words.shape[1], generator=generator, device=words.device)
    embedding.w.copy_((projection @ ((words - words.mean(0)) / words.std()).T)[..., None, None])
    few = [to_mapped(batch) for batch in images[:2]]  # a batch has as many equations as pixels
    drawn = [one_hot(encoder(x).argmax(1), vocab_size) for x in few]
    weight, bias = _least_squares((_features(decoder, z), _rows(x.logit())) for z, x in zip(drawn, few, strict=True))
    tail.w.zero_()[:3] = weight[..., None, None]
    tail.b[:3] = bias
    # the likeliest scale of a Laplace distribution is its mean absolute error
    tail.b[3:] = (few[0].logit() - decoder(drawn[0])[:, :3]).abs().mean().clamp(min=1e-3).log()


def kmeans(points: Tensor, num_words: int, generator: torch.Generator) -> Tensor:
    """Centres [num_words, D] of points [n, D], from a k-means++ start: no two centres on the same point."""
    first = torch.randint(len(points), (1,), generator=generator, device=points.device)
    words = points[first]
    distance = (points - words).square().sum(1)
    for _ in reported(range(num_words - 1), "start 4/5, first words", num_words - 1):
        # with fewer different points than words all distances end at 0
        chosen = torch.multinomial(distance + 1e-12, 1, generator=generator)
        words = torch.cat([words, points[chosen]])
        distance = torch.minimum(distance, (points - points[chosen]).square().sum(1))
    for _ in reported(range(ROUNDS), "start 5/5, rounds of k-means", ROUNDS):
        _, word = nearest(points, words)
        count = torch.bincount(word, minlength=num_words)[:, None]
        means = torch.zeros_like(words).index_add_(0, word, points) / count.clamp(min=1)
        words = torch.where(count > 0, means, words)
    return words


def nearest(points: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance [n] to the nearest word, and which word [n] it is."""
    found = [torch.cdist(chunk, words).min(1) for chunk in points.split(CHUNK)]
    return torch.cat([part.values for part in found]).square(), torch.cat([part.indices for part in found])


def _conv(net: Encoder | Decoder, name: str) -> Conv2d:
    conv = net.blocks.get_submodule(name)
    assert isinstance(conv, Conv2d)
    return conv


def _features(net: Encoder | Decoder, x: Tensor) -> Tensor:
    """What the last convolution sees: [B h w, C]."""
    return _rows(F.relu(nn.Sequential(*list(net.blocks)[:-1])(x)))


def _quarters(pixels: Tensor, stride: int) -> Tensor:
    """Mean colours of the four quarters of each patch: [B, 12, h / stride, w / stride]."""
    return F.pixel_unshuffle(F.avg_pool2d(pixels, stride // 2), 2)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _least_squares(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] that best map the rows [n, in] of each pair to its rows [n, out]."""
    gram, moment = torch.zeros(()), torch.zeros(())
    for x, y in pairs:
        x = F.pad(x.double(), (0, 1), value=1.0)
        gram, moment = gram.to(x) + x.T @ x, moment.to(x) + x.T @ y.double()
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, moment).float()
    return solution[:-1].T, solution[-1]
