"""A room's Triton kernels at small and odd shapes, once each: the program that compute-sanitizer watches. It imports little."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from benches.kernel_judging import as_list, cotangents, leaves
from fastllava_kernels import rooms
from fastllava_kernels._tuning import tuning
from fastllava_kernels._tuning.tune import Noted
from fastllava_kernels.masked_linear_cross_entropy.kernel_loss_rows import LARGEST_ROW
from fastllava_kernels.workload import Shape

TRITON = "triton"
MARK = "launched: "
"""Begins the line that names the kernels."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def small_shapes(room: str) -> Mapping[str, Shape]:
    """The workload's tiny shapes; each with fewer rows, at a number that no block divides; and with rows of logits longer than a block."""
    shapes: dict[str, Shape] = {}
    for name, shape in rooms()[room].workload.shapes.items():
        if name.partition("-")[0] == "tiny":
            shapes[name] = shape
            shapes[f"{name}, odd"] = {**shape, **{key: shape[key] - 3 for key in ("rows", "patches") if shape.get(key, 0) > 8}}
            if "supervised" in shape:
                shapes[f"{name}, long"] = {**shape, "supervised": 3, "vocabulary": LARGEST_ROW + 3}
    return shapes


def exercise(room: str, device: str, dtype: str) -> None:
    """Forward and backward at every small shape; prints which kernels were launched."""
    where = torch.device(device)
    with noted(where) as configs:
        for shape in small_shapes(room).values():
            run_once(room, shape, DTYPES[dtype], where)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
    sys.stdout.write(f"{MARK}{json.dumps([name for name, config in configs.items() if config.taken])}\n")


@contextmanager
def noted(device: torch.device) -> Iterator[Mapping[str, Noted]]:
    """Every kernel runs with the configuration it has anyway, and is noted."""
    configs = {name: Noted(tuning.config(kernel, 1, device)) for name, kernel in tuning.kernels().items()}
    with ExitStack() as stack:
        for name, config in configs.items():
            stack.enter_context(tuning.override(name, config))
        yield configs


def run_once(room: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Forward as in evaluation, then as in training with, where something learns, backward."""
    args: Any = rooms()[room].workload.inputs(shape, dtype, device, 0)
    function = rooms()[room].implementations[TRITON].function
    with torch.no_grad():
        function(*args)
    outputs = as_list(function(*args))
    if learning := leaves(args):
        torch.autograd.grad(outputs, learning, cotangents(outputs), allow_unused=True)
