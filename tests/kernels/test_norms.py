"""Our kernels of the norms: bounds, layout, order of sums, rounding, tracing; test_accuracy.py judges their numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from judging import assert_a_kept_graph_repeats, distances, draw, leaves, outputs_and_gradients, rounded
from launches import recorded
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from truths import truth_of

from fastllava_kernels import rooms
from fastllava_kernels._device import rms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import tuning
from fastllava_kernels.layer_norm import kernel_layer_norm

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="Triton was loaded without its interpreter and there is no GPU")

ROOMS = ["rms_norm", "add_rms_norm", "layer_norm"]
MODULES = {"rms_norm": rms, "add_rms_norm": rms, "layer_norm": kernel_layer_norm}
STREAMS = {"rms_norm": 1, "add_rms_norm": 2, "layer_norm": 1}
PARAMETERS = {"rms_norm": 1, "add_rms_norm": 1, "layer_norm": 2}
every_room = pytest.mark.parametrize("room", ROOMS)


def function(room: str, name: str = "triton") -> Callable[..., Any]:
    return rooms()[room].implementations[name].function


def case(room: str, name: str = "usual") -> Any:
    return rounded(truth_of(room).CASES[name], torch.float32, torch.float32, DEVICE)


def args_of(room: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    streams = tuple(draw(rows, width, seed=i) for i in range(STREAMS[room]))
    parameters = tuple(draw(width, seed=10 + i) for i in range(PARAMETERS[room]))
    return rounded((*streams, *parameters, 1e-6), dtype, dtype, DEVICE)


def per_row(room: str, found: list[Tensor]) -> list[Tensor]:
    """Results and the gradients of what they came from, without those of the parameters."""
    return found[: -PARAMETERS[room]]


@every_room
def test_opcheck(room: str) -> None:
    args = case(room)
    assert function(room)
    forward, backward = (getattr(torch.ops.fastllava, f"{room}_triton{suffix}") for suffix in ("", "_backward"))
    # What traces them is in test_one_graph_for_every_number_of_rows.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, args, test_utils=checks)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    grads = [x * 2 for x in plain[: STREAMS[room]]]
    for wants in (True, False):
        torch.library.opcheck(backward, (*grads, plain[0], plain[STREAMS[room]], plain[-1], wants), test_utils=checks)


@every_room
def test_a_kept_graph_gives_the_same_bits_again_and_no_input_is_written(room: str) -> None:
    args = args_of(room, 37, 40)
    assert_a_kept_graph_repeats(function(room), args)


@every_room
def test_layout_in_memory_changes_no_bit(room: str) -> None:
    args = args_of(room, 6, 20)
    plain = outputs_and_gradients(function(room), args)
    for change in (lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, dim=0)[::2]):
        other = tuple(change(x.detach()).requires_grad_() if isinstance(x, Tensor) and x.ndim > 1 else x for x in args)
        assert not other[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(plain, outputs_and_gradients(function(room), other), strict=True))


@every_room
def test_a_frozen_weight_gets_no_gradient_and_changes_no_other(room: str) -> None:
    args = args_of(room, 9, 24)
    frozen = tuple(x.detach() if isinstance(x, Tensor) and x.ndim == 1 else x for x in args)
    plain, found = (outputs_and_gradients(function(room), given) for given in (args, frozen))
    assert all(torch.equal(a, b) for a, b in zip(per_row(room, plain), found, strict=True))


@every_room
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (5, 3), (7, 100), (33, 48), (2, 1100), (60, 130)])
def test_sizes_that_fill_no_block_are_written_whole_and_nothing_beside_them(
    room: str, rows: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs and results lie between rows of NaN; what a result's memory held before is NaN too."""
    buffers = []

    def framed(x: Tensor) -> Tensor:
        buffers.append(torch.full((x.numel() + 64,), torch.nan, dtype=x.dtype, device=DEVICE))
        return buffers[-1][32:-32].view(x.shape)

    args = args_of(room, rows, width)
    expected = outputs_and_gradients(function(room, "reference"), args)
    inside = tuple(framed(x).copy_(x.detach()).requires_grad_() if isinstance(x, Tensor) else x for x in args)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: framed(x))
    found = outputs_and_gradients(function(room), inside)
    monkeypatch.undo()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-5)
    assert len(buffers) > len(leaves(args)) + 1
    for buffer in buffers:
        assert buffer[32:-32].isfinite().all()
        assert buffer[:32].isnan().all()
        assert buffer[-32:].isnan().all()


@every_room
def test_each_row_has_the_same_bits_wherever_it_lies_and_whatever_lies_beside_it(room: str) -> None:
    """In another order, and cut into pieces."""
    args = args_of(room, 75, 32)
    plain = per_row(room, outputs_and_gradients(function(room), args))
    cotangents = [draw(*one.shape, seed=99 + i).float().to(DEVICE) for i, one in enumerate(plain[: STREAMS[room]])]

    def of(rows: Tensor) -> list[Tensor]:
        given = tuple(x.detach()[rows].requires_grad_() if isinstance(x, Tensor) and x.ndim > 1 else x for x in args)
        out = function(room)(*given)
        outs = list(out) if isinstance(out, tuple) else [out]
        grads = torch.autograd.grad(outs, given[: STREAMS[room]], [x[rows] for x in cotangents])
        return [*outs, *grads]

    order = torch.randperm(75, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for rows in (order, torch.arange(0, 31, device=DEVICE), torch.arange(31, 75, device=DEVICE), torch.tensor([74], device=DEVICE)):
        assert all(torch.equal(one, other[rows]) for one, other in zip(of(rows), plain, strict=True))


@every_room
def test_no_configuration_changes_more_than_the_order_of_the_weight_s_sums(room: str) -> None:
    args = args_of(room, 75, 32)
    names = [name for name in tuning.kernels() if name.startswith(f"{room}.") and not name.endswith("_frozen")]
    plain = outputs_and_gradients(function(room), args)
    for block, programs, stages in ((128, 2, 3), (512, 5, 2), (4096, 132, 3)):
        config = {"BLOCK": block, "PROGRAMS": programs, "STAGES": stages, "num_warps": 1, "num_stages": 1}
        with tuning.override(names[0], config), tuning.override(names[1], config):
            found, again = (outputs_and_gradients(function(room), args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(per_row(room, found), per_row(room, plain), strict=True))
        count = PARAMETERS[room]
        assert max(distances(found[-count:], [x.double() for x in plain[-count:]])) < 1e-6


@every_room
def test_the_weight_s_gradient_is_summed_in_fp32(room: str) -> None:
    """The sum of 4,096 ones in fp16 stops growing at 2048."""
    args = args_of(room, 4096, 2, torch.float16)
    for x in args[: STREAMS[room]]:
        x.data.copy_(torch.tensor([1.0, -1.0]).expand_as(x))
    outs = function(room)(*args)
    out = outs[0] if isinstance(outs, tuple) else outs
    for grad in torch.autograd.grad(out, args[STREAMS[room] : -1], torch.ones_like(out)):
        assert grad.abs().tolist() == [4096.0, 4096.0]


@every_room
def test_it_rounds_where_the_reference_rounds(room: str) -> None:
    """Results in fp16 are the same bits but where 1 / rms differs in fp32's last digit; one rounding fewer would change a fifth of them."""
    args = args_of(room, 64, 256, torch.float16)
    outs, expected = (function(room, name)(*args) for name in ("triton", "reference"))
    for one, other in zip(outs, expected, strict=True) if isinstance(outs, tuple) else [(outs, expected)]:
        assert (one != other).float().mean() < 0.002


@every_room
def test_one_graph_for_every_number_of_rows(room: str) -> None:
    torch._dynamo.reset()
    frames, graphs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(function(room), fullgraph=True, dynamic=True, backend=frames)
    for rows in (2, 3, 5):
        args = args_of(room, rows, 16)
        for one, other in zip(outputs_and_gradients(compiled, args), outputs_and_gradients(function(room), args), strict=True):
            assert torch.equal(one, other)
        graphs.append(frames.frame_count)
    # The first number of rows may take two, the first of which tries eps as a tensor.
    assert graphs[0] == graphs[-1] <= 2


@every_room
def test_kernels_run_on_the_device_of_their_tensors(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = recorded(monkeypatch, MODULES[room])
    args = case(room)
    outputs_and_gradients(function(room), args)
    assert [device for _, device in launched] == [args[0].device] * 2


def test_rows_lie_beyond_2_to_the_31_elements(vast: Tensor) -> None:
    """A row whose offset is 2**32 elements, which is 0 in 32 bits: of 16 columns, 2**30 apart."""
    x = vast.as_strided((5, 16), (2**30, 1))
    x[[0, 4]] = torch.tensor([[3.0], [1.0]], dtype=torch.float16)
    constants = {"WIDTH": 2**30, "BLOCK_D": 16, "BLOCK": 16, "PROGRAMS": 1, "STAGES": 1}
    weight, out = torch.ones(16, dtype=torch.float16), torch.zeros(5, 16)
    for forward in (True, False):
        x[1:4] = 0.0
        if forward:
            # What is added is 0, so the sum goes where x was.
            rms.rms_forward_kernel[(1,)](x, x, weight, x, x, 5, 1.0, ADD=False, **constants)
        else:
            rms.rms_backward_kernel[(1,)](x, x, x, weight, x, out, 5, 1.0, ADD=False, LEARNS=False, **constants)
        assert torch.equal(x[:, 0], x[:, 15])
        assert x[[0, 4], 0].tolist() == [3.0, 1.0]
