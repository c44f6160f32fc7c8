"""The rooms around Liger's kernels and torch.compile: gradients, layout, tracing, and the number of graphs.

Without a GPU Liger's ops run their plain PyTorch, which shows everything about them but the kernels themselves; Liger's
rope runs in Triton's interpreter. On a GPU test_accuracy.py and the tests here run the kernels.
"""

import importlib
import re
from typing import Any

import pytest
import torch
import triton
from judging import FP64, distances, leaves, outputs_and_gradients, rounded
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from truths import truth_of

from fastllava_kernels import choose, rooms
from fastllava_kernels._device import liger as liger_module
from fastllava_kernels._device.compiled import compiled
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.room import REFERENCE

LIGER = ["add_rms_norm", "layer_norm", "rms_norm", "rope", "swiglu"]
COMPILED = [*LIGER, "quick_gelu"]
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@pytest.fixture
def frames() -> CompileCounter:
    """Counts the graphs of torch.compile, with nothing compiled before."""
    torch._dynamo.reset()
    return CompileCounter()


def case(room: str, name: str = "usual") -> Any:
    return rounded(truth_of(room).CASES[name], DTYPE, DTYPE, DEVICE)


def liger(room: str) -> Any:
    return rooms()[room].implementations["liger"].function


def ops_of(room: str) -> tuple[Any, Any]:
    """The custom op and its backward."""
    assert liger(room), "loading it defines the ops"
    return getattr(torch.ops.fastllava, f"{room}_liger").default, getattr(torch.ops.fastllava, f"{room}_liger_backward").default


def backward_args(room: str, wants_weight: bool) -> tuple[Any, ...]:
    """What autograd hands to the backward op."""
    args = [x.detach() if isinstance(x, Tensor) else x for x in case(room)]
    outs = ops_of(room)[0](*args)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    grads = [torch.ones_like(out) for out in outs]
    if room == "rms_norm":
        return grads[0], args[0], args[1], outs[1], wants_weight
    if room == "add_rms_norm":
        return grads[0], grads[1], outs[1], args[2], outs[2], wants_weight
    if room == "layer_norm":
        return grads[0], args[0], args[1], outs[1], outs[2], wants_weight
    return (*grads, *args[-2:])


@pytest.mark.parametrize("room", LIGER)
def test_every_case_is_as_close_to_truth_as_the_reference(room: str) -> None:
    """On a CPU too, where `choose` offers Liger to nobody but torch.compile and tests run its ops."""
    module = truth_of(room)
    for name, args in module.CASES.items():
        truth = outputs_and_gradients(module.truth, rounded(args, DTYPE, FP64))
        limit = distances(outputs_and_gradients(rooms()[room].implementations[REFERENCE].function, case(room, name)), truth)
        found = distances(outputs_and_gradients(liger(room), case(room, name)), truth)
        slack = rooms()[room].slack[DTYPE]
        assert all(one <= most + slack for one, most in zip(found, limit, strict=True)), f"{name}: {found}, reference {limit}"


class WithTo(float):
    """A number that Liger's kernels may cast, as Triton's interpreter gives kernels plain floats."""

    def to(self, dtype: Any) -> "WithTo":
        return self


class Launched:
    """A kernel of Liger whose float arguments are `WithTo`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.kernel[grid](*(WithTo(x) if isinstance(x, float) else x for x in args), **constants)

        return launch


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the kernels run in every test here")
@pytest.mark.parametrize("room", LIGER)
def test_liger_s_kernels_get_the_arguments_that_they_want(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's own kernels in the interpreter, which lacks two things that they use: casts of numbers and libdevice's rsqrt."""
    module = importlib.import_module(f"liger_kernel.ops.{'fused_' * (room == 'add_rms_norm')}{room}")
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel") and hasattr(kernel, "__getitem__"):
            monkeypatch.setattr(module, name, Launched(kernel))
    if hasattr(module, "rsqrt"):
        # Looked up at the call: the interpreter replaces the functions of triton.language while a kernel runs.
        monkeypatch.setattr(module, "rsqrt", lambda x: triton.language.rsqrt(x))
    monkeypatch.setattr(liger_module, "takes", lambda *args, **kwargs: True)
    test_every_case_is_as_close_to_truth_as_the_reference(room)
    test_retained_graph_gives_the_same_gradients_twice_and_writes_over_nothing(room)
    test_layout_in_memory_changes_no_bit(room)


@pytest.mark.parametrize("room", LIGER)
def test_ops_pass_opcheck(room: str) -> None:
    torch.library.opcheck(ops_of(room)[0], case(room))
    for wants_weight in (True, False):
        torch.library.opcheck(ops_of(room)[1], backward_args(room, wants_weight))


@pytest.mark.parametrize("room", LIGER)
def test_retained_graph_gives_the_same_gradients_twice_and_writes_over_nothing(room: str) -> None:
    args = case(room)
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
    out = liger(room)(*args)
    outs = out if isinstance(out, tuple) else (out,)
    kept = [one.detach().clone() for one in outs]
    cotangents = [torch.linspace(-1, 1, one.numel(), device=DEVICE).to(DTYPE).view_as(one) for one in outs]
    given = [x.clone() for x in cotangents]
    first = [x.clone() for x in torch.autograd.grad(outs, leaves(args), cotangents, retain_graph=True)]
    second = torch.autograd.grad(outs, leaves(args), cotangents)
    for one, other in [*zip(first, second, strict=True), *zip(cotangents, given, strict=True), *zip(outs, kept, strict=True)]:
        assert torch.equal(one, other)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True) if isinstance(x, Tensor))


@pytest.mark.parametrize("room", LIGER)
def test_used_twice_adds_up_into_a_gradient_that_is_there(room: str) -> None:
    def total(args: Any) -> Tensor:
        out = liger(room)(*args)
        return torch.stack([one.float().square().sum() for one in (out if isinstance(out, tuple) else (out,))]).sum()

    once, twice = case(room), case(room)
    total(once).backward()
    for leaf in leaves(twice):
        leaf.grad = torch.ones_like(leaf)
    (total(twice) + total(twice)).backward()
    for one, two in zip(leaves(once), leaves(twice), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(two.grad, 2 * one.grad + 1, rtol=1e-5 if DTYPE is torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("room", LIGER)
def test_layout_in_memory_changes_no_bit(room: str) -> None:
    args = case(room)
    # The last axis is not the innermost one, and rows lie apart.
    strided = [x.detach().mT.contiguous().mT if isinstance(x, Tensor) and x.ndim > 1 else x for x in args]
    strided = [
        x.repeat_interleave(2, dim=0)[::2].requires_grad_(y.requires_grad) if isinstance(y, Tensor) else y
        for x, y in zip(strided, args, strict=True)
    ]
    assert not strided[0].is_contiguous()
    for one, other in zip(outputs_and_gradients(liger(room), tuple(strided)), outputs_and_gradients(liger(room), tuple(args)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("room", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_a_frozen_weight_gets_no_gradient(room: str) -> None:
    args = case(room)
    for x in args:
        if isinstance(x, Tensor) and x.ndim == 1:
            x.requires_grad_(False)
    out = liger(room)(*args)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert args[0].grad is not None
    assert all(x.grad is None for x in args if isinstance(x, Tensor) and x.ndim == 1)


@pytest.mark.parametrize("room", LIGER)
def test_traces_into_one_graph_for_every_number_of_rows(room: str, frames: CompileCounter) -> None:
    function = torch.compile(liger(room), fullgraph=True, backend=frames)
    for rows in (2, 5, 7, 11, 64):
        args = with_rows(room, rows)
        got, expected = function(*args), liger(room)(*args)
        for one, other in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
            assert torch.equal(one, other)
    # One for the first number of rows, one for all others.
    assert frames.frame_count == 2


def with_rows(room: str, rows: int) -> tuple[Any, ...]:
    """The usual case repeated to this number of rows."""
    return tuple(
        x.detach().repeat_interleave(rows, dim=0)[:rows].contiguous().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.ndim > 1
        else x
        for x in case(room)
    )


@pytest.mark.parametrize("room", COMPILED)
def test_compiled_makes_one_graph_for_every_number_of_rows(room: str, frames: CompileCounter) -> None:
    reference = rooms()[room].implementations[REFERENCE].function
    function = compiled(reference, backend=frames)
    for rows in (2, 5, 7, 0, 1, 11, 64):
        args = with_rows(room, rows)
        got, expected = function(*args), reference(*args)
        for one, other in zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]:
            assert torch.equal(one, other)
    assert frames.frame_count == 1


def test_compiled_is_part_of_a_larger_graph(frames: CompileCounter) -> None:
    swiglu = rooms()["swiglu"].implementations["compiled"].function
    gate, up = case("swiglu")
    got = torch.compile(lambda x, y: swiglu(x, y) + x, fullgraph=True, backend=frames)(gate, up)
    assert torch.equal(got, rooms()["swiglu"].implementations[REFERENCE].function(gate, up) + gate)
    assert frames.frame_count == 1


def test_compiled_code_is_as_close_to_truth_as_the_reference() -> None:
    """One room: each costs seconds of a C++ compiler."""
    module = truth_of("rms_norm")
    if rooms()["rms_norm"].implementations["compiled"].unsupported(DEVICE, DTYPE) is not None:
        pytest.skip("no C++ compiler")
    truth = outputs_and_gradients(module.truth, rounded(module.CASES["usual"], DTYPE, FP64))
    functions = [rooms()["rms_norm"].implementations[name].function for name in ("compiled", REFERENCE)]
    found, limit = (distances(outputs_and_gradients(function, case("rms_norm")), truth) for function in functions)
    assert all(one <= most + rooms()["rms_norm"].slack[DTYPE] for one, most in zip(found, limit, strict=True))


@pytest.mark.parametrize("room", LIGER)
def test_liger_on_a_cpu_is_refused_with_the_reason(room: str) -> None:
    message = f"kernels.{room}: 'liger' cannot run here (it is a Triton kernel and needs a CUDA GPU); write kernels.{room}=auto"
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(rooms()[room], "liger", CPU, torch.float32)


@pytest.mark.parametrize("room", COMPILED)
def test_auto_compiles_on_a_gpu_only(room: str) -> None:
    assert choose(rooms()[room], "auto", CPU, torch.float32) == REFERENCE
    assert "cuda" in rooms()[room].implementations["compiled"].auto_on


def test_without_a_cxx_compiler_compiled_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllava_kernels._device import compiled as module

    module._has_cxx_compiler.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    try:
        with pytest.raises(
            ValueError, match=re.escape("'compiled' cannot run here (torch.compile needs a C++ compiler for the CPU: install g++)")
        ):
            choose(rooms()["swiglu"], "compiled", CPU, torch.float32)
    finally:
        module._has_cxx_compiler.cache_clear()
