"""Triton kernels of the root-mean-square norm, with or without the residual addition before it, forward and backward.

The rooms that norm so launch them under their own names, each as `persistent.py` says. Nothing of a row but what was normed is kept
for backward: it has the whole row in registers and computes 1 / rms again. N rows, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels._device import persistent
from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels._tuning import tuning


@triton.jit(do_not_specialize=["rows"])
def rms_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    rows,
    eps,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write out = weight * (x / rms of x), row by row; ADD: of x + residual, rounded, which is written to sum."""
    BLOCK_ROWS: tl.constexpr = (BLOCK + BLOCK_D - 1) // BLOCK_D
    d = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_ROWS, rows, PROGRAMS * BLOCK_ROWS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = first + tl.arange(0, BLOCK_ROWS)[:, None]
        at = row.to(tl.int64) * WIDTH + d
        inside = (row < rows) & (d < WIDTH)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        if ADD:
            residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
            # Rounded as the sum that the next layers read.
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
            tl.store(sum_ptr + at, x, mask=inside)
        x = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / WIDTH + eps)
        # Rounded before the weight, as Llama's norm is.
        normed = (x * rstd).to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + at, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    d_x_ptr,
    partial_ptr,
    rows,
    eps,
    ADD: tl.constexpr,
    LEARNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write the gradient of what was normed, x; ADD: that of the sum is added.

    LEARNS: write what each program's rows give to the weight's gradient, fp32 [programs, D].
    """
    BLOCK_ROWS: tl.constexpr = (BLOCK + BLOCK_D - 1) // BLOCK_D
    d = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK_ROWS, rows, PROGRAMS * BLOCK_ROWS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = first + tl.arange(0, BLOCK_ROWS)[:, None]
        at = row.to(tl.int64) * WIDTH + d
        inside = (row < rows) & (d < WIDTH)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scaled = grad * weight
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / WIDTH + eps)
        along = tl.sum(scaled * x, axis=1, keep_dims=True) / WIDTH
        if LEARNS:
            d_weight += grad * (x * rstd)
        d_x = rstd * (scaled - x * (along * rstd * rstd))
        if ADD:
            d_x += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    if LEARNS:
        column = tl.arange(0, BLOCK_D)
        tl.store(partial_ptr + tl.program_id(0) * WIDTH + column, tl.sum(d_weight, axis=0), mask=column < WIDTH)


class RmsKernels:
    """The kernels of a room that norms by the root mean square: `kernels` by name, and what launches each."""

    def __init__(self, room: str, add: bool) -> None:
        self._room, self._add = room, add
        self.kernels = tuning.by_name(_described(room, name, add) for name in ("forward", "backward", "backward_frozen"))

    def forward(self, x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Compute (normed, what was normed) of contiguous tensors [..., D]; the second is x itself where nothing is added."""
        out = torch.empty_like(x)
        summed = x if residual is None else torch.empty_like(x)
        if x.numel():
            rows, width = x.shape[:-1].numel(), len(weight_D)
            constants, grid = persistent.share(self.kernels[f"{self._room}.forward"], rows, width, x, ADD=self._add)
            with on_device_of(x):
                rms_forward_kernel[grid](x, x if residual is None else residual, weight_D, out, summed, rows, eps, **constants)
        return out, summed

    def backward(
        self, grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight_D: Tensor, eps: float, learns: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of what was normed and, if it `learns`, of the weight: summed in fp32 in one order, the same every time."""
        d_x = torch.empty_like(x)
        if not x.numel():
            return d_x, torch.zeros_like(weight_D) if learns else None
        rows, width = x.shape[:-1].numel(), len(weight_D)
        kernel = self.kernels[f"{self._room}.backward{'' if learns else '_frozen'}"]
        constants, grid = persistent.share(kernel, rows, width, x, ADD=self._add, LEARNS=learns)
        partial = weight_D.new_empty((*grid, width) if learns else (0,), dtype=torch.float32)
        with on_device_of(x):
            rms_backward_kernel[grid](
                grad,
                grad if grad_sum is None else grad_sum,
                x,
                weight_D,
                d_x,
                partial,
                rows,
                eps,
                **constants,
            )
        return d_x, partial.sum(0).to(weight_D.dtype) if learns else None


def _described(room: str, variant: str, add: bool) -> tuning.Kernel:
    backward = variant != "forward"
    names = (
        ("grad_ptr", "grad_sum_ptr", "x_ptr", "weight_ptr", "d_x_ptr")
        if backward
        else ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr")
    )
    return persistent.described(
        f"{room}.{variant}",
        rms_backward_kernel if backward else rms_forward_kernel,
        dict.fromkeys(names, "*bf16") | ({"partial_ptr": "*fp32"} if backward else {}),
        {"ADD": add} | ({"LEARNS": variant == "backward"} if backward else {}),
        width=4096,
        resident={"forward": 4, "backward": 2, "backward_frozen": 3}[variant],
    )
