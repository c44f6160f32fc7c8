"""Our kernels of rope and swiglu: layout, writes, determinism, tracing; test_accuracy.py judges their numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from judging import assert_a_kept_graph_repeats, outputs_and_gradients, rounded
from launches import recorded
from truths import truth_of

from fastllava_kernels import rooms
from fastllava_kernels.rope import kernel_rotate
from fastllava_kernels.swiglu import kernel_swiglu

ROOMS = ("rope", "swiglu")
KERNELS = {"rope": kernel_rotate, "swiglu": kernel_swiglu}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

every_room = pytest.mark.parametrize("room", ROOMS)


def case(room: str, name: str = "usual") -> Any:
    return rounded(truth_of(room).CASES[name], torch.float32, torch.float32, DEVICE)


def function(room: str) -> Callable[..., Any]:
    return rooms()[room].implementations["triton"].function


@every_room
def test_opcheck(room: str) -> None:
    args = case(room)
    assert function(room), "whose module defines the ops"
    torch.library.opcheck(getattr(torch.ops.fastllava, f"{room}_triton"), args)
    of_backward = {"rope": args, "swiglu": (args[0] * 2, *args)}[room]
    plain = [x.detach() for x in of_backward]
    torch.library.opcheck(getattr(torch.ops.fastllava, f"{room}_triton_backward"), plain)


@every_room
def test_a_kept_graph_gives_the_same_bits_again_and_no_input_is_written(room: str) -> None:
    args = case(room)
    assert_a_kept_graph_repeats(function(room), args)


@every_room
def test_layout_in_memory_changes_no_bit(room: str) -> None:
    args = case(room)
    strided = tuple(x.detach().mT.contiguous().mT.requires_grad_(x.requires_grad) for x in args)
    apart = tuple(x.detach().repeat_interleave(2, dim=0)[::2].requires_grad_(x.requires_grad) for x in args)
    assert not strided[0].is_contiguous()
    plain = outputs_and_gradients(function(room), args)
    for other in (strided, apart):
        assert all(torch.equal(a, b) for a, b in zip(plain, outputs_and_gradients(function(room), other), strict=True))


def test_heads_of_a_row_need_no_copy_wherever_the_rows_lie() -> None:
    q = torch.zeros(5, 3, 12)[:, :2]
    assert kernel_rotate._heads_contiguous(q) is q
    assert kernel_rotate._heads_contiguous(q.mT) is not q


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(3, 1, 6), (5, 5, 10), (1, 1, 2)])
def test_sizes_that_fill_no_block(heads: int, key_heads: int, width: int) -> None:
    """The output's memory holds NaN before; every element is written."""
    draws = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4, n, width, generator=draws).to(DEVICE).requires_grad_() for n in (heads, key_heads))
    cos, sin = (torch.randn(4, width, generator=draws).to(DEVICE) for _ in range(2))
    expected = outputs_and_gradients(rooms()["rope"].implementations["reference"].function, (q, k, cos, sin))
    torch.use_deterministic_algorithms(True)
    try:
        found = outputs_and_gradients(function("rope"), (q, k, cos, sin))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_swiglu_writes_its_elements_and_none_beside_them() -> None:
    buffers = [torch.full((40,), float("nan"), device=DEVICE) for _ in range(2)]
    gate, up, grad = (torch.randn(21, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(3))
    kernel_swiglu._launch("swiglu.backward", kernel_swiglu._backward, grad, gate, up, buffers[0][:21], buffers[1][:21])
    for buffer in buffers:
        assert buffer[:21].isfinite().all()
        assert buffer[21:].isnan().all()


@every_room
def test_one_graph_for_every_number_of_rows(room: str) -> None:
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function(room), fullgraph=True, dynamic=True, backend=frames)
    for rows in (2, 3, 5):
        args = tuple(x.detach()[:rows].requires_grad_(x.requires_grad) for x in case(room))
        for one, other in zip(outputs_and_gradients(compiled, args), outputs_and_gradients(function(room), args), strict=True):
            assert torch.equal(one, other)
    assert frames.frame_count == 1


@every_room
def test_kernels_run_on_the_device_of_their_tensors(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = recorded(monkeypatch, KERNELS[room])
    args = case(room)
    outputs_and_gradients(function(room), args)
    assert [device for _, device in launched] == [args[0].device] * 2
