"""Higher derivatives of each op are right, or an error that says what has them: never left out."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastbeit_kernels as ops
from fastbeit.model.attention import GatherBias, inverse_index, relative_position_index
from fastbeit_kernels.masked_embed import masked_embed_reference

# PyTorch 2.13 does so itself, the first time that forward mode is used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is:DeprecationWarning")


class Op(NamedTuple):
    """A loss of some leaves through an op, and the same through its definition."""

    name: str
    leaves: list[Tensor]
    loss: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    refuses: bool  # else the derivatives are there


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LABELS = torch.tensor([0, 3, -100, 6, 2])


def of_masked_embed(backend: Any, device: str) -> Op:
    images = torch.arange(2 * 8 * 8 * 3, device=device).to(torch.uint8).view(2, 8, 8, 3)
    masked = torch.tensor([[True, False, False, True]] * 2, device=device)
    half = torch.full((3,), 0.5, device=device)

    def loss(weight: Tensor, bias: Tensor, embed: Any = ops.masked_embed, **chosen: Any) -> Tensor:
        cls = torch.ones_like(bias)
        return embed(images, masked, weight, bias, cls, cls, None, half, half, **chosen).square().sum()

    def definition(weight: Tensor, bias: Tensor) -> Tensor:
        return loss(weight, bias, masked_embed_reference, dtype=torch.float32, out_dtype=torch.float32)

    leaves = [normal(16, 3, 4, 4), normal(16)]
    return Op("masked_embed", leaves, lambda *given: loss(*given, backend=backend), definition, backend == "triton")


def of_relative_attention(backend: Any, device: str) -> Op:
    def loss(attention: Any, *given: Tensor, **chosen: Any) -> Tensor:
        return attention(*given, **chosen).square().sum()

    return Op(
        "relative_attention",
        [normal(1, 5, 3, 1, 16), normal(1, 5, 5)],
        lambda *given: loss(ops.relative_attention, *given, backend=backend),
        lambda *given: loss(ops.relative_attention_reference, *given),
        backend == "triton",
    )


def of_cross_entropy(backend: Any, device: str) -> Op:
    labels = LABELS.to(device)
    return Op(
        "cross_entropy",
        [normal(5, 7)],
        lambda logits: ops.cross_entropy(logits, labels, backend=backend)[0],
        lambda logits: F.cross_entropy(logits, labels),
        backend == "triton",
    )


def of_linear_cross_entropy(backend: Any, device: str) -> Op:
    labels = LABELS.to(device)
    return Op(
        "linear_cross_entropy",
        [normal(5, 4), normal(7, 4), normal(7)],
        lambda hidden, weight, bias: ops.linear_cross_entropy(hidden, weight, bias, labels, backend=backend)[0],
        lambda hidden, weight, bias: F.cross_entropy(F.linear(hidden, weight, bias), labels),
        True,
    )


OPS = of_masked_embed, of_relative_attention, of_cross_entropy, of_linear_cross_entropy


def of_whom(param: Any) -> str:
    return f"{param[0].__name__.removeprefix('of_')}-{param[1]}"


@pytest.fixture(params=[(of, backend) for of in OPS for backend in ("triton", "reference")], ids=of_whom)
def op(request: pytest.FixtureRequest, device: str) -> Op:
    of, backend = request.param
    made = of(backend, device)
    return made._replace(leaves=[leaf.to(device).requires_grad_() for leaf in made.leaves])


def penalised(loss: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a loss with ten times the square of its own gradient."""
    value = loss(*leaves)
    (grad,) = torch.autograd.grad(value, leaves[0], create_graph=True)
    return torch.autograd.grad(value + 10 * grad.square().sum(), leaves)


def test_reverse_over_reverse(op: Op):
    if op.refuses:
        with pytest.raises(RuntimeError, match=f"^{op.name} has no second derivative.*{op.name}_reference"):
            penalised(op.loss, op.leaves)
    else:
        torch.testing.assert_close(penalised(op.loss, op.leaves), penalised(op.definition, op.leaves))


@pytest.mark.parametrize("place", [0, -1])
def test_forward_mode(op: Op, place: int):
    leaves = [leaf.detach() for leaf in op.leaves]

    def along(loss: Callable[..., Tensor]) -> Tensor:
        def of_one(leaf: Tensor) -> Tensor:
            given = list(leaves)
            given[place] = leaf
            return loss(*given)

        return torch.func.jvp(of_one, (leaves[place],), (torch.ones_like(leaves[place]),))[1]

    if op.refuses:
        with pytest.raises(RuntimeError, match=f"^{op.name} has no forward-mode derivative.*{op.name}_reference"):
            along(op.loss)
    else:
        torch.testing.assert_close(along(op.loss), along(op.definition))


def test_forward_over_reverse(op: Op):
    """A tangent that only the gradient carries."""
    value = op.loss(*op.leaves)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value))
        if op.refuses:
            with pytest.raises(RuntimeError, match=f"^{op.name} has no forward-mode derivative"):
                torch.autograd.grad(value, op.leaves, seed)
        else:
            grad = forward_ad.unpack_dual(torch.autograd.grad(value, op.leaves[0], seed)[0])
            torch.testing.assert_close(grad.tangent, grad.primal)  # linear in the seed


def test_first_derivatives_are_as_before(op: Op):
    """Alone, checkpointed in both ways, and compiled whole."""
    leaves, want = op.leaves, torch.autograd.grad(op.definition(*op.leaves), op.leaves)

    def check(loss: Callable[..., Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()
        torch.testing.assert_close([leaf.grad for leaf in leaves], list(want), rtol=1e-4, atol=1e-4)

    check(op.loss)
    for reentrant in (True, False):
        check(lambda *given: checkpoint(op.loss, *given, use_reentrant=reentrant))  # noqa: B023 - called at once
    check(torch.compile(op.loss, fullgraph=True, backend="aot_eager"))


def test_the_gather_of_the_bias_has_the_second_derivative():
    index = relative_position_index((2, 2))
    inverse = inverse_index(index)
    table = normal(int(index.max()) + 1, 2).double().requires_grad_()

    def gathered(table: Tensor) -> Tensor:
        bias: Any = GatherBias.apply(table, index, inverse)
        return bias

    assert torch.autograd.gradcheck(gathered, table)
    assert torch.autograd.gradgradcheck(lambda table: gathered(table).pow(3), table)
    with pytest.raises(RuntimeError, match="setup_context|forward AD"):
        torch.func.jvp(gathered, (table.detach(),), (torch.ones_like(table),))


def test_names_of_the_package_are_functions_and_modules_are_still_found():
    for name in ("linear_cross_entropy", "cross_entropy", "masked_embed", "relative_attention", "block_masks"):
        module = import_module(f"fastbeit_kernels.{name}")
        assert getattr(ops, name) is getattr(module, name) and callable(getattr(ops, name))
    assert all(hasattr(ops, name) for name in ops.__all__)
