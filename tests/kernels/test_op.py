"""Ops of PyTorch's dispatcher, registered for little of the host's time: all that `torch.library.custom_op` promises of one."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from judging import outputs_and_gradients, rounded
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from truths import truth_of

from fastllava_kernels import rooms
from fastllava_kernels.contract import custom_op
from fastllava_kernels.op import Op
from fastllava_kernels.room import REFERENCE

CPU = torch.device("cpu")


@custom_op("test_scaled")
def scaled(x: Tensor, weight: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
    """x * weight * factor, and x's sum, which gets no gradient."""
    return x * weight * factor, x.sum()


@scaled.register_fake
def _(x: Tensor, weight: Tensor, factor: float = 2.0) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(())


@custom_op("test_scaled_backward")
def scaled_backward(grad: Tensor, x: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return grad * weight * factor, grad * x * factor


@scaled_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.factor = inputs
    ctx.save_for_backward(x, weight)
    ctx.mark_non_differentiable(output[1])


scaled.register_autograd(
    lambda ctx, grad, _: (*scaled_backward(grad, *ctx.saved_tensors, ctx.factor), None),
    setup_context=_keep,
)


@custom_op("test_sums")
def sums(x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor | None], flags: Sequence[bool]) -> list[Tensor]:
    """x times each weight, plus the other where there is one."""
    return [x * weight + (0 if other is None else other) for weight, other in zip(weights, others, strict=True)]


@sums.register_fake
def _(x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor | None], flags: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(x) for _ in weights]


needs: list[Any] = []


def _keep_sums(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, others, flags = inputs
    ctx.save_for_backward(x, *weights)
    ctx.count, ctx.flags = len(others), flags
    assert len(output) == len(weights)


def _gradients_of_sums(ctx: Any, grads: list[Tensor]) -> Any:
    x, *weights = ctx.saved_tensors
    needs.append(ctx.needs_input_grad)
    d_x = sum(grad * weight for grad, weight in zip(grads, weights, strict=True)) if weights else torch.zeros_like(x)
    d_others = [grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad[2], strict=True)]
    return d_x, [grad * x for grad in grads], d_others, None


sums.register_autograd(_gradients_of_sums, setup_context=_keep_sums)


@pytest.fixture
def two() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)


@pytest.fixture
def names() -> Iterator[list[str]]:
    """The ops of ours that are dispatched meanwhile."""
    found = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastllava":
                found.append(func.name())
            return func(*args, **(kwargs or {}))

    with Mode():
        yield found


@pytest.mark.parametrize("call", [scaled, lambda *args: torch.ops.fastllava.test_scaled(*args)], ids=["ours", "by name"])
def test_gradients_are_those_that_were_registered(two: tuple[Tensor, Tensor], call: Any) -> None:
    x, weight = two
    out, total = call(x, weight)
    assert not total.requires_grad
    cotangent = torch.randn(3, 4)
    got = torch.autograd.grad(out, two, cotangent, retain_graph=True)
    again = torch.autograd.grad(out, two, cotangent)
    assert torch.equal(out, x * weight * 2)
    assert torch.equal(got[0], cotangent * weight * 2)
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    # Of one input alone, and with an argument that is its default, which PyTorch leaves out, or another one.
    assert torch.equal(torch.autograd.grad(call(x.detach(), weight, 2.0)[0].sum(), weight)[0], x * 2)
    assert torch.equal(torch.autograd.grad(call(x, weight, 3.0)[0].sum(), x)[0], weight * 3)


def test_nothing_is_kept_without_a_gradient(two: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        assert not scaled(*two)[0].requires_grad
    assert not scaled(two[0].detach(), two[1].detach())[0].requires_grad


def test_lists_of_tensors_have_lists_of_gradients(two: tuple[Tensor, Tensor]) -> None:
    x, weight = two
    frozen, other = torch.ones(3, 4), torch.randn(3, 4, requires_grad=True)
    needs.clear()
    one, more = sums(x, [weight, frozen], [None, other], [True, False])
    for _ in range(2):
        got = torch.autograd.grad(one.sum() + 2 * more.sum(), (x, weight, other), retain_graph=True)
        assert torch.equal(got[0], weight + 2)
        assert torch.equal(got[1], x)
        assert torch.equal(got[2], torch.full((3, 4), 2.0))
    assert list(map(tuple, needs[0][1:3])) == [(True, False), (False, True)], "as the arguments are"
    assert needs[0] == needs[1]
    assert sums(x, [], [], []) == []


def test_no_gradient_where_none_was_registered_and_none_of_a_gradient(two: tuple[Tensor, Tensor]) -> None:
    for call in (scaled_backward, torch.ops.fastllava.test_scaled_backward):
        with pytest.raises(RuntimeError, match="fastllava::test_scaled_backward gets no gradient"):
            call(torch.ones(3, 4), *two, 2.0)[0].sum().backward()
    (d_x,) = torch.autograd.grad(scaled(*two)[0].sum(), two[0], create_graph=True)
    with pytest.raises(RuntimeError, match="fastllava::test_scaled_backward gets no gradient"):
        d_x.sum().backward()


def test_a_dispatch_mode_sees_each_call_once(two: tuple[Tensor, Tensor], names: list[str]) -> None:
    scaled(*two)[0].sum().backward()
    torch.ops.fastllava.test_scaled(*two)
    with torch.no_grad():
        scaled(*two)
    name = "fastllava::test_scaled"
    assert names == [name, f"{name}_backward", name, name]


def test_it_goes_into_one_graph_of_torch_compile(two: tuple[Tensor, Tensor]) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    scaled_twice = torch.compile(lambda x, w: scaled(scaled(x, w)[0], w)[0] + 1, fullgraph=True, backend=counter)
    assert torch.equal(scaled_twice(*two), scaled(scaled(*two)[0], two[1])[0] + 1)
    assert counter.frame_count == 1
    traced = torch.compile(lambda x, w: scaled(x, w)[0] * 2, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(call(*two).sum(), two) for call in (traced, lambda x, w: scaled(x, w)[0] * 2))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_tensors_without_data_have_its_shapes() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(5, 6, requires_grad=True), torch.empty(5, 6, requires_grad=True)
        out, total = scaled(x, weight)
        out.sum().backward()
        assert (out.shape, total.shape, x.grad.shape) == ((5, 6), (), (5, 6))


@pytest.mark.parametrize("op", [scaled, scaled_backward, sums], ids=lambda op: op.name)
def test_opcheck(op: Op, two: tuple[Tensor, Tensor]) -> None:
    x, weight = two
    given = {
        scaled: (x, weight, 3.0),
        scaled_backward: (torch.ones(3, 4), x.detach(), weight.detach(), 2.0),
        sums: (x, [weight, torch.ones(3, 4)], [None, torch.ones(3, 4)], [True]),
    }[op]
    torch.library.opcheck(op.overload, given)


def test_opcheck_refuses_an_op_that_returns_or_writes_over_an_input() -> None:
    """What each call of torch.library.custom_op looks for."""
    returns = custom_op("test_returns")(_returns)
    returns.register_fake(torch.empty_like)
    writes = custom_op("test_writes")(_writes)
    writes.register_fake(torch.empty_like)
    for op in (returns, writes):
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
            torch.library.opcheck(op.overload, (torch.ones(3),))


def _returns(x: Tensor) -> Tensor:
    return x


def _writes(x: Tensor) -> Tensor:
    return x.add_(1).clone()


def test_a_list_among_several_results_is_refused() -> None:
    def both(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x, [x]

    with pytest.raises(ValueError, match="list"):
        custom_op("test_both")(both)


class Watched(TorchDispatchMode):
    """Holds of each op of ours what every call of torch.library.custom_op looks for, and that it writes over no input."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fastllava":
            return func(*args, **(kwargs or {}))
        self.seen.add(func.name())
        given = [x for x in tree_iter(args) if isinstance(x, Tensor)]
        before = [x.clone() for x in given]
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        there = {x.untyped_storage().data_ptr() for x in given if x.untyped_storage().nbytes()}
        new = [x.untyped_storage().data_ptr() for x in made if x.untyped_storage().nbytes()]
        assert not there & set(new), f"{func.name()} returns memory of an input"
        assert len(set(new)) == len(new), f"{func.name()} returns the same memory twice"
        for x, was in zip(given, before, strict=True):
            assert torch.equal(x.nan_to_num(), was.nan_to_num()), f"{func.name()} writes over an input"
        return result


PAIRS = [
    (room.name, name)
    for room in rooms().values()
    for name, one in room.implementations.items()
    if name not in (REFERENCE, "compiled") and (one.interpretable or one.unsupported(CPU, torch.float32) is None)
]


@pytest.mark.parametrize(("room", "name"), PAIRS)
def test_no_op_of_a_room_returns_or_writes_over_an_input(room: str, name: str) -> None:
    function, watched = rooms()[room].implementations[name].function, Watched()
    for values in truth_of(room).CASES.values():
        args = rounded(values, torch.float32, torch.float32)
        with watched:
            outputs_and_gradients(function, args)
            with torch.no_grad():
                function(*args)
    assert any(name.endswith("_backward") for name in watched.seen)
