"""Proof that imported weights are a trained tokenizer: it is shown test pictures, and has to give them back.

Names and shapes say of what kind a file is; a random net has the same. These pictures are drawn here, always alike, so
that the proof wants no data. Measured on them, of 112 x 112 pixels:

    weights                                       PSNR, dB           words in use
    the mean colour of each picture               15.2
    random dVAEs, 60 of OpenAI's kind             5.6 to 14.9 (six)  1 to 15
    random dVAEs, 14 of the BEiT authors' kind    not measured       3 to 34
    the bundled tokenizer                         24.4               379
"""

import math

import torch
from torch import Tensor, nn

from fastbeit.errors import TokenizerError
from fastbeit.tokenizer.codebook import CodebookEncoder
from fastbeit.tokenizer.disk import in_memory
from fastbeit.tokenizer.precision import token_agreement
from fastbeit.tokenizer.quality import measure_quality, word_usage

NUM_PICTURES = 6
GRID = 14, 14  # tokens a picture: those of BEiT's token view
# half of the squared error that the mean colour leaves. Random nets are no better than that colour, and the small
# bundled tokenizer is three times as far above it
MIN_GAIN_DB = 3.0
# nearly twice what any random net uses; a small vocabulary cannot have so many, and half of it will do
MIN_WORDS, MIN_WORDS_SHARE = 60, 0.5
MIN_WORDS_OF_CODEBOOK = 2  # one of flat colours, which is a good one for some data, uses 10 here


def prove(encoder: nn.Module, decoder: nn.Module | None) -> str:
    """What the weights of a tokenizer give on the test pictures, as a line for the user.

    Without a decoder the words in use are all that can be judged. So it is of codebooks: what their maker meant them to
    give back is not known.

    Raises:
        TokenizerError: they are below a floor; the message has the figures.
    """
    tokenizer, is_codebook = in_memory(encoder, decoder), isinstance(encoder, CodebookEncoder)
    images = pictures(*tokenizer.view_size(GRID))
    figures, failed = [], []
    if decoder is None:
        words = word_usage(tokenizer, [images]).num_in_use
    else:
        quality = measure_quality(tokenizer, [images])
        words, psnr_db, colour_db = quality.usage.num_in_use, quality.psnr_db, mean_colour_psnr_db(images)
        figures.append(f"PSNR {psnr_db:.1f} dB (their mean colours: {colour_db:.1f})")
        if psnr_db < colour_db + MIN_GAIN_DB and not is_codebook:
            failed.append(f"PSNR of {colour_db + MIN_GAIN_DB:.1f} dB")
    floor = MIN_WORDS_OF_CODEBOOK if is_codebook else MIN_WORDS
    wanted = min(floor, math.ceil(MIN_WORDS_SHARE * tokenizer.vocab_size))
    figures.append(f"words in use {words}")
    if words < wanted:
        failed.append(f"{wanted} words in use")
    line = f"on {NUM_PICTURES} test pictures: {', '.join(figures)}"
    if failed:
        raise TokenizerError(
            f"these weights are not the trained tokenizer that they claim to be: {line}; at least "
            f"{' and '.join(failed)} wanted; no tokenizer was written"
        )
    return f"proof {line}{_rounding(encoder, images)}"


def _rounding(encoder: nn.Module, images: Tensor) -> str:
    """How many tokens turn in float16, which a run on CUDA would choose."""
    if isinstance(encoder, CodebookEncoder):
        return "; it always computes in fp32"
    try:
        agreement = token_agreement(in_memory(encoder, None, torch.float16), in_memory(encoder, None), images)
    except TokenizerError as err:
        return f"; fp16 overflows: {err}"
    return f"; {100 * agreement:.1f} % of the tokens in fp16 are those of fp32"


def mean_colour_psnr_db(images: Tensor) -> float:
    """What one colour for each picture of [B, h, w, 3], the best, would give."""
    pixels = images.double() / 255
    return -10 * math.log10((pixels - pixels.mean((1, 2), keepdim=True)).square().mean())


def pictures(height: int, width: int) -> Tensor:
    """Gradients under stripes and discs, in colours: uint8 [6, h, w, 3], always the same."""
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width)[None, :].expand(height, width)
    angle = torch.arange(NUM_PICTURES)[:, None, None] * (torch.pi / NUM_PICTURES)
    along = angle.cos() * x + angle.sin() * y  # [6, h, w]
    # 1 to 6 stripes: the finest are still as wide as a token
    stripes = (torch.sin(along * (4 + 3 * torch.arange(NUM_PICTURES)[:, None, None])) > 0).float()
    radius = torch.linspace(0.3, 0.8, NUM_PICTURES)[:, None, None]
    discs = ((x - 0.2).square() + (y + 0.1).square() < radius.square()).float()
    shapes = torch.stack([(along + 1.5) / 3, stripes, discs], -1)  # [6, h, w, 3]
    # rows: gradient, stripes, disc; columns: red, green, blue
    colours = torch.tensor([[0.6, 0.6, 0.5], [0.1, 0.2, 0.3], [0.3, 0.1, 0.2]])
    return (255 * (shapes @ colours + 0.02).clamp(0, 1)).round().byte()
