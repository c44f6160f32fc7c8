"""Triton kernels of layer_norm, forward and backward, each as `persistent.py` says.

Nothing of a row but itself is kept for backward, which computes its mean and deviation again. N rows, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels._device import persistent
from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels._tuning import tuning


@triton.jit
def _normed(x, inside, eps, WIDTH: tl.constexpr):
    """Compute (x - mean) / deviation of each row, 0 beyond its end, and 1 / deviation."""
    centred = tl.where(inside, x - tl.sum(x, axis=1, keep_dims=True) / WIDTH, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / WIDTH + eps)
    return centred * rstd, rstd


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the norm, row by row, rounded once."""
    BLOCK_ROWS: tl.constexpr = (BLOCK + BLOCK_D - 1) // BLOCK_D
    d = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    first_row, step = tl.program_id(0) * BLOCK_ROWS, PROGRAMS * BLOCK_ROWS
    for first in tl.range(first_row, rows, step, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = first + tl.arange(0, BLOCK_ROWS)[:, None]
        at = row.to(tl.int64) * WIDTH + d
        inside = (row < rows) & (d < WIDTH)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed, _ = _normed(x, inside, eps, WIDTH)
        tl.store(out_ptr + at, (normed * weight + bias).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    d_x_ptr,
    partial_ptr,
    rows,
    eps,
    LEARNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write x's gradient; LEARNS: also what each program's rows give to those of weight and bias, fp32 [2, programs, D]."""
    BLOCK_ROWS: tl.constexpr = (BLOCK + BLOCK_D - 1) // BLOCK_D
    d = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    d_bias = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    first_row, step = tl.program_id(0) * BLOCK_ROWS, PROGRAMS * BLOCK_ROWS
    for first in tl.range(first_row, rows, step, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        row = first + tl.arange(0, BLOCK_ROWS)[:, None]
        at = row.to(tl.int64) * WIDTH + d
        inside = (row < rows) & (d < WIDTH)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed, rstd = _normed(x, inside, eps, WIDTH)
        if LEARNS:
            d_weight += grad * normed
            d_bias += grad
        scaled = grad * weight
        mean = tl.sum(scaled, axis=1, keep_dims=True) / WIDTH
        along = tl.sum(scaled * normed, axis=1, keep_dims=True) / WIDTH
        tl.store(d_x_ptr + at, (rstd * (scaled - mean - normed * along)).to(d_x_ptr.dtype.element_ty), mask=inside)
    if LEARNS:
        column = tl.arange(0, BLOCK_D)
        partial_ptr += tl.program_id(0) * WIDTH
        tl.store(partial_ptr + column, tl.sum(d_weight, axis=0), mask=column < WIDTH)
        tl.store(partial_ptr + tl.num_programs(0) * WIDTH + column, tl.sum(d_bias, axis=0), mask=column < WIDTH)


def forward(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Compute the norm of contiguous x, [..., D]."""
    out = torch.empty_like(x)
    if x.numel():
        rows, width = x.shape[:-1].numel(), len(weight_D)
        constants, grid = persistent.share(KERNELS["layer_norm.forward"], rows, width, x)
        with on_device_of(x):
            _forward[grid](x, weight_D, bias_D, out, rows, eps, **constants)
    return out


def backward(grad: Tensor, x: Tensor, weight_D: Tensor, eps: float, learns: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of contiguous x and, if they learn, of weight and bias: summed in fp32 in one order, the same every time."""
    d_x = torch.empty_like(x)
    if not x.numel():
        return (d_x, torch.zeros_like(weight_D), torch.zeros_like(weight_D)) if learns else (d_x, None, None)
    rows, width = x.shape[:-1].numel(), len(weight_D)
    constants, grid = persistent.share(KERNELS[f"layer_norm.backward{'' if learns else '_frozen'}"], rows, width, x, LEARNS=learns)
    partial = weight_D.new_empty((2, *grid, width) if learns else (0,), dtype=torch.float32)
    with on_device_of(x):
        _backward[grid](grad, x, weight_D, d_x, partial, rows, eps, **constants)
    if not learns:
        return d_x, None, None
    return d_x, partial[0].sum(0).to(weight_D.dtype), partial[1].sum(0).to(weight_D.dtype)


_BACKWARD = {**dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "d_x_ptr"), "*bf16"), "partial_ptr": "*fp32"}
# As wide as CLIP-L's hidden states.
_WIDTH = 1024

KERNELS = tuning.by_name(
    (
        persistent.described(
            "layer_norm.forward",
            _forward,
            dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16"),
            {},
            width=_WIDTH,
            resident=3,
        ),
        persistent.described("layer_norm.backward", _backward, _BACKWARD, {"LEARNS": True}, width=_WIDTH, resident=2),
        persistent.described("layer_norm.backward_frozen", _backward, _BACKWARD, {"LEARNS": False}, width=_WIDTH, resident=3),
    )
)
