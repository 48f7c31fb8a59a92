"""The moving average of a model's weights (arXiv 2102.12092, A.2)."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastbeit.engine.sharded import any_sharded, check_shape, cut, is_sharded, joined, part_of, streamed
from fastbeit.engine.streamed import Streamed
from fastbeit.train.tensor_file import Renamed

PREFIX = "average."  # of its weights in a checkpoint


class Average:
    """Weights that follow those of a model; early steps are forgotten sooner.

    Where weights are shared out over ranks, each rank averages its part.

    Args:
        decay: None: there is no average.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.source, self.decay = model, decay
        self._model: nn.Module | None = None  # the averaged one, where weights are whole
        self._parts: dict[str, Tensor] = {}  # by name, where they are not
        if decay is not None and any_sharded(model):
            self._parts = {name: part_of(parameter).detach().clone() for name, parameter in model.named_parameters()}
        elif decay is not None:
            self._model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 0."""
        if self.decay is None:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        means = self._model.parameters() if self._model else self._parts.values()
        for mean, parameter in zip(means, self.source.parameters(), strict=True):
            mean.lerp_(part_of(parameter), weight)

    @contextlib.contextmanager
    @torch.no_grad()
    def kept(self, make_model: Callable[[], nn.Module]) -> Iterator[nn.Module]:
        """The model that is looked at and kept: the averaged one, else the one that is trained.

        Whole on each rank: where weights are shared out, `make_model` makes another one for as long as the context
        lasts, and all ranks must enter it.
        """
        if not any_sharded(self.source):
            yield self._model or self.source
            return
        parameters = dict(self.source.named_parameters())
        with torch.device("meta"):
            model = make_model()
        model.to_empty(device=next(iter(parameters.values())).device)
        for name, parameter in model.named_parameters():
            source = parameters[name]
            parameter.copy_(joined(self._parts.get(name, part_of(source)), source))
        buffers = dict(self.source.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        yield model

    def weights(self) -> dict[str, Tensor | Streamed]:
        """For a checkpoint."""
        if self.decay is None:
            return {}
        state: dict[str, Tensor | Streamed] = dict((self._model or self.source).state_dict())
        parameters = dict(self.source.named_parameters())
        state |= {name: streamed(parameters[name], part) for name, part in self._parts.items()}
        return {f"{PREFIX}{name}": one for name, one in state.items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], rank: int) -> None:
        """Of a checkpoint's weights, those that `weights` gave.

        Raises:
            KeyError, RuntimeError: they are of another model, or there are none.
        """
        mine = Renamed(weights, {name.removeprefix(PREFIX): name for name in weights if name.startswith(PREFIX)})
        if self._model:
            self._model.load_state_dict(dict(mine))
        for name, parameter in self.source.named_parameters() if self._parts else ():
            value = mine[name]
            check_shape(name, value, parameter)
            self._parts[name].copy_(cut(value, parameter, rank) if is_sharded(parameter) else value)
