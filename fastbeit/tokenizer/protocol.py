"""What gives an image its visual tokens (section 2.1): the interface that every tokenizer follows.

Whatever has these members can take the place of the dVAE; it need not inherit from anything. `Strided` gives some of
them to a tokenizer that has one word for each square of pixels. One that knows sixteen shades of grey:

    >>> import torch
    >>> from fastbeit.tokenizer.frozen import Strided
    >>> class Shades(Strided):
    ...     vocab_size, stride, fingerprint, device = 16, 8, "shades-16-of-8x8", torch.device("cpu")
    ...     def encode(self, images):
    ...         grey = self.checked_images(images).float().mean(3)
    ...         return (torch.nn.functional.avg_pool2d(grey, self.stride) / 16).long().flatten(1)
    ...     def decode(self, ids, grid=None):
    ...         grey = (self.checked_ids(ids, grid) * 16 + 8).byte()
    ...         return grey.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None].repeat(1, 1, 1, 3)
    >>> tokenizer: Tokenizer = Shades()
    >>> tokenizer.view_size((2, 3))
    (16, 24)
    >>> ids = tokenizer.encode(torch.full((1, 16, 24, 3), 200, dtype=torch.uint8))
    >>> ids
    tensor([[12, 12, 12, 12, 12, 12]])
    >>> tokenizer.decode(ids, (2, 3)).shape
    torch.Size([1, 16, 24, 3])

For one that a config can name by its path, a line in `disk.KINDS` says which classes read its directory.
"""

from typing import Protocol

from torch import Tensor


class Tokenizer(Protocol):
    """Frozen, and a function of the image alone: the same image has the same tokens in any batch, on any day.

    A run asks `view_size` once for the token view that gives a word to each of the model's patches; then all batches
    have that size. Patch and square of pixels need not agree: BEiT's patches have 16 x 16 pixels of a 224 x 224 view,
    the dVAE's words 8 x 8 of a 112 x 112 view of the same crop. Input may lie on any device, and output is on the
    tokenizer's; no member keeps a gradient; what does not fit is a `ValueError` that says what would.
    """

    @property
    def vocab_size(self) -> int:
        """Words V: tokens are 0 to V - 1; at most 65,535 where tokens are cached."""
        ...

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens, another for others: a hash of all that decides them, weights and code alike.

        Runs and caches of tokens remember it and refuse to go on with another one.
        """
        ...

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens down and across for a token view of this height and width."""
        ...

    def view_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the token view that gives so many tokens down and across: `grid` undoes it."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, h, w, 3], RGB, to int64 [B, N], row by row."""
        ...

    def encode_at(self, images: Tensor, places: Tensor) -> Tensor:
        """The tokens of some places alone, int64 [B, M] for places [B, M] of 0 to N - 1: what `encode` gives there.

        Pre-training asks for masked patches alone. An encoder that chooses words by a large product saves most of it;
        where two words are alike to the last bits, the other order of sums may choose the other one.
        """
        ...

    def decode(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """int64 [B, N] to uint8 [B, h, w, 3]; without `grid` the tokens form a square.

        Training never asks for it: pictures and reports do.
        """
        ...
