"""`fastllava bench host`: microseconds of the host for a call of an op, without what computes it, on any machine. No GPU.

First three ways to make an op that computes nothing: by `torch.library.custom_op`, as this package does, and as a bare autograd
function, which torch.compile and the planner would not see as an op. Then every Triton op of a decoder layer, with all that happens before
its kernel is launched; Triton's own launch is left out. Times are the thread's own, so a busy machine changes them little. What
autograd's engine takes to begin is part of every backward.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benches.lib.results import Row, Sheet
from benches.lib.world import world
from fastllava_kernels import rooms
from fastllava_kernels._tuning import tuning
from fastllava_kernels.contract import custom_op

ROOMS = ("rms_norm", "add_rms_norm", "rope", "swiglu")
"""Those of a decoder layer whose `auto` is a Triton kernel of this package."""
CALLS, ROUNDS = 20, 200
CPU = torch.device("cpu")


def bench(sheet: Sheet, rounds: int = ROUNDS) -> list[Row]:
    """A row for each way to make an op, with its share of custom_op's time, and one for each op of a layer; all take turns."""
    ways = {name: (call, _two) for name, call in _ways().items()}
    for variant, us in _microseconds(ways, rounds).items():
        base = sheet.rows[0] if sheet.rows else us
        shares = {f"{part}_share": us[part] / base[part] for part in us}
        sheet.add({"what": "an op", "variant": variant} | us | shares | world(CPU), in_words)
    layer = {room: (rooms()[room].implementations["triton"].function, _inputs(room)) for room in ROOMS}
    with _without_launching():
        for room, us in _microseconds(layer, rounds).items():
            sheet.add({"what": "an op", "room": room, "implementation": "triton"} | us | world(CPU), in_words)
    return sheet.rows


def in_words(row: Row) -> str:
    """Microseconds, and their share of custom_op's."""
    parts = ("forward", "backward", "evaluation")
    return ", ".join(f"{part} {row[part]:.1f} us" + (f" ({row[f'{part}_share']:.2f})" if f"{part}_share" in row else "") for part in parts)


def _microseconds(
    calls: Mapping[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Medians of forward with what is kept for backward, of backward in autograd's engine, and of a call without gradients."""
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    args = {name: inputs() for name, (_, inputs) in calls.items()}
    for number in range(rounds + 2):
        for name, (call, _) in calls.items():
            found = _once(call, args[name])
            if number >= 2:
                taken[name].append(found)
    parts = ("forward", "backward", "evaluation")
    return {name: dict(zip(parts, map(statistics.median, zip(*each, strict=True)), strict=True)) for name, each in taken.items()}


def _once(call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, float, float]:
    begin = time.thread_time_ns()
    made = [call(*args) for _ in range(CALLS)]
    forward = time.thread_time_ns()
    outs = [list(out) if isinstance(out, tuple) else [out] for out in made]
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    grads = [torch.ones_like(out) for out in outs[0]]
    before = time.thread_time_ns()
    for out in outs:
        torch.autograd.grad(out, leaves, grads)
    backward = time.thread_time_ns()
    with torch.no_grad():
        for _ in range(CALLS):
            call(*args)
    end = time.thread_time_ns()
    return (forward - begin) / 1e3 / CALLS, (backward - before) / 1e3 / CALLS, (end - backward) / 1e3 / CALLS


def _two() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, 8, requires_grad=True), torch.zeros(4, 8, requires_grad=True)


def _inputs(room: str) -> Callable[[], tuple[Any, ...]]:
    workload = rooms()[room].workload
    return lambda: workload.inputs(workload.shapes["tiny"], torch.float32, CPU, 0)


def _ways() -> dict[str, Callable[..., Any]]:
    """One op of two inputs that computes nothing, made in each way; custom_op's first."""
    library = _op(lambda name: torch.library.custom_op(f"fastllava_bench::{name}", mutates_args=()))
    return {"torch.library.custom_op": library, "fastllava_kernels.op": _op(custom_op), "autograd function": _Bare.apply}


def _op(define: Callable[[str], Any]) -> Any:
    @define("bench_host")
    def op(x: Tensor, y: Tensor) -> Tensor:
        return torch.empty_like(x)

    @define("bench_host_backward")
    def backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(y)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    op.register_autograd(lambda ctx, grad: backward(grad, *ctx.saved_tensors), setup_context=keep)
    return op


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@contextmanager
def _without_launching() -> Iterator[None]:
    """Kernels of a layer are launched nowhere, and take every tensor."""
    modules: list[Any] = [importlib.import_module(f"fastllava_kernels.{room}.triton_op") for room in ROOMS]
    functions = {id(kernel.function): kernel.function for kernel in tuning.kernels().values() if kernel.room in ROOMS}.values()
    takes = [module.takes for module in modules]
    try:
        for module in modules:
            module.takes = lambda tensor: True
        for function in functions:
            function.run = lambda *args, **named: None
        yield
    finally:
        for module, own in zip(modules, takes, strict=True):
            module.takes = own
        for function in functions:
            vars(function).pop("run", None)
