"""One dtype of the results, inside autocast and outside, in eager and compiled, of inputs in one dtype and in several."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from judging import FP64, Table, distances, leaves, outputs_and_gradients, rounded
from torch import Tensor
from truths import truth_of

from fastllava_kernels import Room, rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.room import REFERENCE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOSS = "masked_linear_cross_entropy"


def runs_here(room: Room, name: str) -> bool:
    one = room.implementations[name]
    if DEVICE.type not in one.auto_on:
        return False
    return one.unsupported(DEVICE, torch.float32) is None or (one.interpretable and INTERPRETED)


PAIRS = [(room.name, name) for room in rooms().values() for name in room.implementations if runs_here(room, name)]
every_implementation = pytest.mark.parametrize(("room", "name"), PAIRS)


def function(room: str, name: str) -> Callable[..., Any]:
    return rooms()[room].implementations[name].function


def usual(room: str, dtype: torch.dtype) -> Any:
    cases = truth_of(room).CASES
    return rounded(cases.get("usual", next(iter(cases.values()))), dtype, dtype, DEVICE)


def in_two_dtypes(value: Any, first: bool = True) -> Any:
    """The first tensor as it is, every other floating one in fp32."""
    if isinstance(value, list | tuple):
        items = [in_two_dtypes(item, first and place == 0) for place, item in enumerate(value)]
        return type(value)(items)
    if first or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().float().requires_grad_(value.requires_grad)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@every_implementation
def test_autocast_changes_no_bit_and_no_dtype(room: str, name: str, inside: bool) -> None:
    """Results and gradients are the same, also where backward runs inside it."""
    args = usual(room, torch.float32)
    plain = outputs_and_gradients(function(room, name), args)
    out = None
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        if inside:
            found = outputs_and_gradients(function(room, name), args)
        else:
            out = function(room, name)(*args)
    if out is not None:
        found = outputs_and_gradients(lambda *_: out, args)
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@every_implementation
def test_results_are_in_the_first_input_s_dtype_and_gradients_in_their_own(room: str, name: str, autocast: bool) -> None:
    args = in_two_dtypes(usual(room, torch.bfloat16))
    with torch.autocast(DEVICE.type, dtype=torch.float16 if DEVICE.type == "cuda" else torch.bfloat16) if autocast else nullcontext():
        found = outputs_and_gradients(function(room, name), args)
    count = len(found) - len(leaves(args))
    wanted = torch.float32 if room == LOSS else torch.bfloat16
    assert [one.dtype for one in found[:count]] == [wanted] * count
    for one, leaf in zip(found[count:], leaves(args), strict=True):
        assert one is not None
        assert one.dtype == leaf.dtype
    case = truth_of(room).CASES.get("usual", next(iter(truth_of(room).CASES.values())))
    true = outputs_and_gradients(truth_of(room).truth, rounded(case, torch.bfloat16, FP64))
    assert max(distances(found, true)) < 3e-2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@every_implementation
def test_a_compiled_graph_gives_the_same_dtypes_inside_autocast(room: str, name: str, backend: str) -> None:
    if rooms()[room].implementations[name].untraceable is not None:
        pytest.skip("never part of a graph")
    args = in_two_dtypes(usual(room, torch.bfloat16))
    torch._dynamo.reset()
    compiled = torch.compile(function(room, name), fullgraph=True, backend=backend)
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got, wanted = ([out] if isinstance(out, Tensor) else list(out) for out in (compiled(*args), function(room, name)(*args)))
    assert [one.dtype for one in got] == [other.dtype for other in wanted]


@pytest.mark.parametrize(("room", "place", "named"), [(LOSS, 4, "weights_M"), ("rope", 2, "cos_TK"), ("rope", 3, "sin_TK")])
def test_a_gradient_that_no_implementation_gives_is_refused_by_all(room: str, place: int, named: str) -> None:
    for name in [name for one, name in PAIRS if one == room]:
        args = list(usual(room, torch.float32))
        args[place] = args[place].detach().clone().requires_grad_()
        out = function(room, name)(*args)
        outs = out if isinstance(out, tuple) else (out,)
        total = torch.stack([one.sum() for one in outs]).sum()
        torch.autograd.grad(total, args[0], retain_graph=True)
        with pytest.raises(RuntimeError, match=f"{room}: {named} gets no gradient"):
            torch.autograd.grad(total, args[place], retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match=f"{room}: {named} gets no gradient"):
            total.backward()


@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["no loss scale", "loss scale"])
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "formed in forward"])
@pytest.mark.parametrize("name", [name for one, name in PAIRS if one == LOSS])
def test_fp16_logit_gradients_stay_in_range(name: str, keeps: bool, scale: float) -> None:
    """With 1 / tokens of a large batch as each weight a probability's gradient is far below fp16's smallest number."""
    draws = torch.Generator().manual_seed(0)
    rows, width, vocabulary = (64, 8, 500) if keeps else (64, 2, 500)
    hidden = torch.randn(rows, width, generator=draws).half().to(DEVICE)
    head = (torch.randn(vocabulary, width, generator=draws) * 0.3).half().to(DEVICE)
    targets = torch.randint(vocabulary, (rows,), generator=draws).to(DEVICE)
    supervised, weights = torch.arange(rows, device=DEVICE), torch.full((rows,), 1 / 65536, device=DEVICE)
    true_hidden, true_head = hidden.double().requires_grad_(), head.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(true_hidden @ true_head.t(), targets, reduction="none")
    true = torch.autograd.grad((losses * weights.double()).sum() * scale, (true_hidden, true_head))
    master, hidden = head.float().requires_grad_(), hidden.requires_grad_()
    loss = function(LOSS, name)(hidden, master, supervised, targets, weights)
    assert loss.item() == pytest.approx((losses * weights).sum().item(), rel=1e-3)
    if name == REFERENCE and scale == 1.0:
        return
    d_hidden, d_head = torch.autograd.grad(loss * scale, (hidden, master))
    assert distances([d_head], [true[1]])[0] < 1e-3
    if scale > 1.0:
        assert distances([d_hidden], [true[0]])[0] < 1e-3


MISFITS: dict[str, Callable[[list[Any]], Any]] = {
    "rope": lambda args: [*args[:2], args[2][:1], args[3][:1]],
    "swiglu": lambda args: [args[0], args[1][:1]],
    "rms_norm": lambda args: [args[0], args[1][:1], *args[2:]],
    "add_rms_norm": lambda args: [args[0], args[1][:1], *args[2:]],
    "layer_norm": lambda args: [args[0], args[1], args[2][:1], *args[3:]],
    "attention": lambda args: [args[0], args[1][:1], args[2][:1], *args[3:]],
    LOSS: lambda args: [*args[:4], args[4][:1]],
    "nf4_linear": lambda args: [args[0][:, :1], *args[1:]],
    "splice": lambda args: [args[0], args[1][:, :1], *args[2:]],
    "projector_splice": lambda args: [*args[:5], args[5][:1]],
    "projector_mlp": lambda args: [args[0][:, :1], args[1]],
    "lora_linear": lambda args: [*args[:3], [one[:, :1] for one in args[3]], *args[4:]],
}


@pytest.mark.parametrize("room", MISFITS)
def test_sizes_that_do_not_fit_are_refused_where_a_kernel_would_read_on(room: str) -> None:
    """What broadcasts in PyTorch is memory of others for a kernel."""
    for name in [name for one, name in PAIRS if one == room]:
        with pytest.raises(ValueError, match=f"{room}: .*; given"):
            function(room, name)(*MISFITS[room](list(usual(room, torch.float32))))


@pytest.mark.parametrize("name", [name for one, name in PAIRS if one == "rope"])
def test_an_odd_head_width_is_refused(name: str) -> None:
    q, k, table = torch.ones(3, 2, 5), torch.ones(3, 1, 5), Table(torch.ones(3, 5)).values
    with pytest.raises(ValueError, match="rope: the width of a head must be even, and is 5"):
        function("rope", name)(q, k, table, table)
