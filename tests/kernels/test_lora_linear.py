"""Room lora_linear: its dropout's numbers, the same mask wherever a row lies, what it keeps, and what is computed again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from judging import leaves, outputs_and_gradients, rounded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from truths import truth_of
from truths.lora_linear import CASES, inputs, mask

from fastllava_kernels import rooms
from fastllava_kernels._device import philox
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.room import REFERENCE

ROOM = rooms()["lora_linear"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PUBLISHED = [
    # Random123 1.14, kat_vectors, philox4x32 of 7 rounds: counter, key, words.
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]
"""What the generator's authors publish."""


def runs_here(name: str) -> bool:
    one = ROOM.implementations[name]
    return one.unsupported(DEVICE, torch.float32) is None or (one.interpretable and INTERPRETED)


NAMES = [name for name in ROOM.implementations if runs_here(name)]
every_implementation = pytest.mark.parametrize("name", NAMES)
with_ops = pytest.mark.parametrize("name", [name for name in NAMES if name != REFERENCE])


def usual(dtype: torch.dtype = torch.float32, case: str = "usual") -> Any:
    return rounded(CASES[case], dtype, dtype, DEVICE)


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_truth_is_the_published_generator(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert tuple(truth_of("lora_linear").philox(key[0] + 2**32 * key[1], counter)) == words


@pytest.mark.parametrize("width", [1, 8, 13, 64])
@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.999])
def test_what_is_dropped_is_what_the_generator_says(width: int, dropout: float) -> None:
    case: Any = inputs(20, 8, (8, 8, 8), 2)
    keys, streams = case[7], case[8]
    for stream in streams:
        found = philox.dropped(keys, stream, width, philox.threshold(dropout))
        assert torch.equal(found, mask(keys, stream.item(), width, dropout) == 0)


def test_the_share_that_is_dropped_is_the_dropout() -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (500,), generator=torch.Generator().manual_seed(0))
    found = philox.dropped(keys, torch.tensor(7), 4096, philox.threshold(0.05)).float()
    # Four standard deviations, of all, of a column and of a row.
    assert abs(found.mean().item() - 0.05) < 4 * (0.05 * 0.95 / found.numel()) ** 0.5
    for dim in (0, 1):
        spread = found.mean(dim).std().item()
        assert spread == pytest.approx((0.05 * 0.95 / found.shape[dim]) ** 0.5, rel=0.2)


@every_implementation
def test_a_row_is_dropped_alike_wherever_it_lies(name: str) -> None:
    """In another order, in two parts, beside other rows: the same results for a row, and its part of the gradients."""
    function = ROOM.implementations[name].function
    x, weights, biases, A, B, scale, dropout, keys, streams = usual(torch.float32)

    def run(rows: Tensor) -> list[Tensor]:
        given = x.detach()[rows].requires_grad_()
        outs = function(given, weights, biases, A, B, scale, dropout, keys[rows], streams)
        upstream = [torch.ones_like(out) for out in outs]
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, [given, *A, *B], upstream)]

    every = torch.arange(len(x), device=DEVICE)
    whole, order = run(every), every.flip(0)
    turned, parts = run(order), [run(every[:4]), run(every[4:])]
    count = len(weights) + 1
    for at, one in enumerate(whole):
        joined = torch.cat([part[at] for part in parts]) if at < count else parts[0][at] + parts[1][at]
        torch.testing.assert_close(turned[at][order] if at < count else turned[at], one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(joined, one, rtol=1e-5, atol=1e-5)


@every_implementation
def test_another_key_or_stream_drops_others(name: str) -> None:
    function = ROOM.implementations[name].function
    args = usual(torch.float32)
    plain = function(*args)
    for place in (7, 8):
        changed = function(*args[:place], args[place] + 2**40, *args[place + 1 :])
        assert not any(torch.equal(one, other) for one, other in zip(plain, changed, strict=True))


@every_implementation
def test_the_gradient_of_a_frozen_weight_or_bias_is_refused(name: str) -> None:
    args = list(usual(torch.float32, "biases"))
    for place, named in ((1, "weights"), (2, "biases")):
        given = [one if one is None else one.detach().clone().requires_grad_() for one in args[place]]
        outs = ROOM.implementations[name].function(*args[:place], given, *args[place + 1 :])
        with pytest.raises(RuntimeError, match=f"lora_linear: {named} gets no gradient"):
            outs[0].sum().backward()


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 0.999999])
def test_a_dropout_that_leaves_nothing_is_refused(dropout: float) -> None:
    args = list(usual())
    args[6] = dropout
    with pytest.raises(ValueError, match="lora_linear: dropout is at least 0 and less than 1, and is"):
        ROOM.implementations[REFERENCE].function(*args)


@with_ops
def test_gradients_of_fp32_masters_are_fp32_sums(name: str) -> None:
    """With rows of 16 bits they come in fp32, as near to fp64 as the hidden values are that are kept."""
    short = torch.float16 if DEVICE.type == "cpu" else torch.bfloat16
    x, weights, biases, A, B, scale, dropout, keys, streams = usual(short)
    wide = [[one.detach().float().requires_grad_() for one in part] for part in (A, B)]
    outs = ROOM.implementations[name].function(x, weights, biases, *wide, scale, dropout, keys, streams)
    d_outs = [torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(short) for out in outs]
    found = torch.autograd.grad(outs, [*wide[0], *wide[1]], d_outs)
    for index, (down, up, stream) in enumerate(zip(A, B, streams.tolist(), strict=True)):
        seen = x.double().cpu() * mask(keys.cpu(), stream, x.shape[1], dropout)
        # What is kept is rounded, and so is its gradient: by these much the sums may differ and no more.
        hidden = seen @ down.double().cpu().T
        d_hidden = scale * d_outs[index].double().cpu() @ up.double().cpu()
        exact = d_hidden.T @ seen, scale * d_outs[index].double().cpu().T @ hidden
        for got, true in zip((found[index], found[len(A) + index]), exact, strict=True):
            assert got.dtype == torch.float32
            assert (got.double().cpu() - true).norm() < torch.finfo(short).eps * true.norm()


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """Grows by each tensor that is kept for backward."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@with_ops
@pytest.mark.parametrize("case", ["usual", "nothing drawn", "NF4"])
def test_kept_are_x_and_the_hidden_values_and_what_is_there_anyway(name: str, case: str) -> None:
    args = usual(torch.float32, case)
    with kept() as found:
        outs = ROOM.implementations[name].function(*args)
    there = {one.data_ptr() for one in tree_leaves(args) if isinstance(one, Tensor)}
    new = [one for one in found if one.data_ptr() not in there and one.numel()]
    assert [one.shape for one in new] == [(len(args[0]), len(outs), len(args[3][0]))]


class Ops(TorchDispatchMode):
    """The names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(func.name())
        return func(*args, **(kwargs or {}))


@with_ops
def test_computed_again_stops_before_the_products(name: str) -> None:
    """Where nothing after it is needed, only the hidden values are computed twice; gradients are the same to the bit."""
    function = ROOM.implementations[name].function
    args = usual(torch.float32)
    plain = outputs_and_gradients(function, args)
    with Ops() as ops:
        again = outputs_and_gradients(lambda *args: checkpoint(function, *args, use_reentrant=False), args)
    own = [one.removeprefix("fastllava::") for one in ops.ran if one.startswith("fastllava::")]
    hidden, results = f"lora_linear_{name}_hidden", f"lora_linear_{name}"
    assert own == [hidden, results, hidden, f"lora_linear_{name}_backward"]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@with_ops
def test_a_result_that_nobody_uses_counts_nowhere(name: str) -> None:
    function = ROOM.implementations[name].function
    args = usual(torch.float32)
    outs = function(*args)
    learns = leaves(args)
    found = torch.autograd.grad(outs[0].sum() + outs[2].sum(), learns, allow_unused=True)
    whole = torch.autograd.grad(sum(out.sum() * (at != 1) for at, out in enumerate(function(*args))), learns)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other)


@with_ops
@pytest.mark.parametrize("frozen", ["x", "A and B"])
def test_what_needs_no_gradient_gets_none(name: str, frozen: str) -> None:
    function = ROOM.implementations[name].function
    args = list(copy.copy(usual(torch.float32)))
    expected = outputs_and_gradients(function, tuple(args))[len(args[1]) :]
    if frozen == "x":
        args[0] = args[0].detach()
        expected = expected[1:]
    else:
        args[3], args[4] = ([one.detach() for one in part] for part in args[3:5])
        expected = expected[:1]
    found = outputs_and_gradients(function, tuple(args))[len(args[1]) :]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@with_ops
def test_opcheck(name: str) -> None:
    """The ops of the forward; that of the backward is reached through them."""
    x, weights, _, A, B, scale, dropout, keys, streams = usual(torch.float32)
    ops = torch.ops.fastllava
    below = philox.threshold(dropout)
    given = (x, weights, A, B, scale, below, keys, streams)
    hidden = getattr(ops, f"lora_linear_{name}_hidden").default
    torch.library.opcheck(hidden, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    h, *places = hidden(*given)
    empty = [weight.new_empty(0) for weight in weights]
    of_results = (x.detach(), weights, empty, h.detach(), [up.detach() for up in B], scale, places)
    results = getattr(ops, f"lora_linear_{name}").default
    torch.library.opcheck(results, of_results, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@with_ops
@pytest.mark.parametrize("case", ["usual", "nothing drawn", "NF4"])
def test_one_graph_of_torch_compile_gives_the_same(name: str, case: str) -> None:
    function = ROOM.implementations[name].function
    args = usual(torch.float32, case)
    plain = outputs_and_gradients(function, args)
    graph = torch.compile(lambda *args: function(*args), fullgraph=True, dynamic=True, backend="aot_eager")
    found = outputs_and_gradients(graph, args)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
