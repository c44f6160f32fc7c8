"""Triton kernels of masked_linear_cross_entropy: losses and logit gradients of a chunk, and the way back to hidden's rows.

The products are the library's: a chunk of fp32 logits is written once and read once where a row fits a block.
Shape letters as in chunked.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels._device.launch import cdiv, on_device_of, power_of_2
from fastllava_kernels._tuning import tuning

LOG2E = tl.constexpr(1.4426950408889634)

LARGEST_ROW = 32768
"""A row of so many logits is read once and kept in registers; a longer one is read twice, block by block."""


@triton.jit
def _log1p(x):
    """Compute log(1 + x) for x >= 0 to fp32's precision, which log of the rounded 1 + x has not for small x.

    By 2 artanh(x / (2 + x)); its series up to the 15th power is exact to fp32 for x <= 1.
    """
    r = x / (2.0 + x)
    s = r * r
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))))))
    return tl.where(x <= 1.0, 2.0 * r * series, tl.log(1.0 + x))


@triton.jit
def _loss(target_logit, largest, target, total):
    """Compute (c - z_y) + log(e_y + S), for c the largest logit, e_y = exp(z_y - c) and S the others' sum."""
    return tl.where(target_logit == largest, _log1p(total), largest - target_logit + tl.log(target + total))


@triton.jit
def _loss_row(
    logits_ptr,
    gradient_ptr,
    losses_ptr,
    residual_ptr,
    targets_ptr,
    weights_ptr,
    vocabulary,
    logits_stride,
    gradient_stride,
    WANTS_GRADIENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute one row of a chunk. gradient_ptr may be logits_ptr. A target that is none of the vocabulary makes the row NaN.

    No mask leaves the target out: it would take apart the vectors in which a row is moved.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    gradient_ptr += row * gradient_stride
    # Compared as wide as it comes: 2**32 + 5 is not 5.
    y = tl.load(targets_ptr + row).to(tl.int64)
    known = (y >= 0) & (y < vocabulary)
    y = tl.where(known, y, 0).to(tl.int32)
    weight = tl.where(known, tl.load(weights_ptr + row), float("nan"))
    target_logit = tl.load(logits_ptr + y).to(tl.float32)
    columns = tl.arange(0, BLOCK_V)
    if ONE_BLOCK:
        z = tl.load(logits_ptr + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
        largest = tl.max(z, axis=0)
        others = tl.where(columns == y, 0.0, tl.exp2((z - largest) * LOG2E))
        total = tl.sum(others, axis=0)
    else:
        # Each lane keeps a maximum and a sum of its own: one reduction at the end instead of one a block.
        lane_largest = tl.full((BLOCK_V,), target_logit, tl.float32)
        lane_total = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, vocabulary, BLOCK_V):
            column = start + columns
            z = tl.load(logits_ptr + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
            z = tl.where(column == y, -float("inf"), z)
            larger = tl.maximum(lane_largest, z)
            lane_total = lane_total * tl.exp2((lane_largest - larger) * LOG2E) + tl.exp2((z - larger) * LOG2E)
            lane_largest = larger
        largest = tl.max(lane_largest, axis=0)
        total = tl.sum(lane_total * tl.exp2((lane_largest - largest) * LOG2E), axis=0)
    target = tl.exp2((target_logit - largest) * LOG2E)
    tl.store(losses_ptr + row, weight * _loss(target_logit, largest, target, total))
    if WANTS_GRADIENT:
        norm = weight / (target + total)
        exact = (0.0 - norm) * total
        kept = exact.to(gradient_ptr.dtype.element_ty)
        tl.store(residual_ptr + row, exact - kept.to(tl.float32))
        if ONE_BLOCK:
            tl.store(gradient_ptr + columns, (others * norm).to(gradient_ptr.dtype.element_ty), mask=columns < vocabulary)
            # Over what one of the block's threads has just written there; a select would take registers that are not left.
            tl.debug_barrier()
            tl.store(gradient_ptr + y, kept)
        else:
            for start in range(0, vocabulary, BLOCK_V):
                column = start + columns
                z = tl.load(logits_ptr + column, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
                others = tl.exp2((z - largest) * LOG2E)
                gradient = tl.where(column == y, kept, (others * norm).to(gradient_ptr.dtype.element_ty))
                tl.store(gradient_ptr + column, gradient, mask=column < vocabulary)


@triton.jit(do_not_specialize=["rows_out"])
def _scatter_row(
    d_rows_ptr,
    residual_ptr,
    grad_loss_ptr,
    weight_ptr,
    supervised_rows_ptr,
    targets_ptr,
    d_hidden_ptr,
    rows_out,
    vocabulary,
    width,
    weight_stride,
    d_hidden_stride,
    BLOCK_D: tl.constexpr,
):
    """Write one block of columns of one supervised row: nothing if it is no row, NaN if its target is none of the vocabulary."""
    m = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(supervised_rows_ptr + m).to(tl.int64)
    y = tl.load(targets_ptr + m).to(tl.int64)
    known = (y >= 0) & (y < vocabulary)
    y = tl.where(known, y, 0)
    residual = tl.where(known, tl.load(residual_ptr + m), float("nan"))
    mask = columns < tl.where((row >= 0) & (row < rows_out), width, 0)
    kept = tl.load(d_rows_ptr + m * width + columns, mask=mask, other=0.0)
    target_row = tl.load(weight_ptr + y * weight_stride + columns, mask=mask, other=0.0)
    target_row = target_row.to(d_hidden_ptr.dtype.element_ty).to(tl.float32)
    complete = (kept + residual * target_row) * tl.load(grad_loss_ptr)
    tl.store(d_hidden_ptr + row * d_hidden_stride + columns, complete.to(d_hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale(gradient_ptr, grad_loss_ptr, elements, BLOCK: tl.constexpr):
    """Multiply one block of a contiguous gradient; nothing is read or written where the upstream gradient is 1, as it is in training."""
    grad_loss = tl.load(grad_loss_ptr)
    if grad_loss != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + at, mask=at < elements, other=0.0)
        tl.store(gradient_ptr + at, gradient * grad_loss, mask=at < elements)


def loss_rows(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, gradient_NV: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """Compute losses and residuals of a chunk, logit gradients into `gradient` (chunked.LossRows), which may be the logits."""
    rows, vocabulary = logits_NV.shape
    losses, residual = torch.empty_like(weights_N), torch.empty_like(weights_N)
    one_block = vocabulary <= LARGEST_ROW
    config = tuning.config(KERNELS["masked_linear_cross_entropy." + ("row" if one_block else "long_row")], rows, logits_NV.device)
    config |= {"WANTS_GRADIENT": wants_gradient, "ONE_BLOCK": one_block}
    if one_block:
        config["BLOCK_V"] = power_of_2(vocabulary)
    with on_device_of(logits_NV):
        _loss_row[(rows,)](
            logits_NV,
            gradient_NV if wants_gradient else logits_NV,
            losses,
            residual,
            targets_N.contiguous(),
            weights_N.contiguous(),
            vocabulary,
            logits_NV.stride(0),
            gradient_NV.stride(0),
            **config,
        )
    return losses, residual


def scale(gradient: Tensor, grad_loss: Tensor) -> None:
    """Multiply a contiguous gradient in place."""
    elements = gradient.numel()
    config = tuning.config(KERNELS["masked_linear_cross_entropy.scale"], elements, gradient.device)
    with on_device_of(gradient):
        _scale[(cdiv(elements, config["BLOCK"]),)](gradient, grad_loss, elements, **config)


def scatter_rows(
    d_rows_MD: Tensor,
    residual_M: Tensor,
    grad_loss: Tensor,
    weight_VD: Tensor,
    supervised_rows: Tensor,
    targets_M: Tensor,
    d_hidden_TD: Tensor,
) -> None:
    """Write `grad_loss * (d_rows + residual * weight[targets])` to the supervised rows of d_hidden, rounded once."""
    rows, width = d_rows_MD.shape
    if weight_VD.stride(1) != 1:
        weight_VD = weight_VD.contiguous()
    master = weight_VD.dtype is not d_hidden_TD.dtype
    config = tuning.config(KERNELS["masked_linear_cross_entropy.scatter_row" + ("_master" if master else "")], rows, d_rows_MD.device)
    with on_device_of(d_rows_MD):
        _scatter_row[(rows, cdiv(width, config["BLOCK_D"]))](
            d_rows_MD,
            residual_M,
            grad_loss,
            weight_VD,
            supervised_rows.contiguous(),
            targets_M.contiguous(),
            d_hidden_TD,
            d_hidden_TD.shape[0],
            weight_VD.shape[0],
            width,
            weight_VD.stride(0),
            d_hidden_TD.stride(0),
            **config,
        )


GPUS = ("sm_80", "sm_90")

_LOSS_ROW_SIGNATURE = {
    "logits_ptr": "*fp32",
    "gradient_ptr": "*bf16",
    "losses_ptr": "*fp32",
    "residual_ptr": "*fp32",
    "targets_ptr": "*i64",
    "weights_ptr": "*fp32",
    "vocabulary": "i32",
    "logits_stride": "i32",
    "gradient_stride": "i32",
}


def _scatter_kernel(name: str, weight_type: str) -> tuning.Kernel:
    return tuning.Kernel(
        name=f"masked_linear_cross_entropy.{name}",
        function=_scatter_row,
        signature={
            "d_rows_ptr": "*fp32",
            "residual_ptr": "*fp32",
            "grad_loss_ptr": "*fp32",
            "weight_ptr": weight_type,
            "supervised_rows_ptr": "*i32",
            "targets_ptr": "*i64",
            "d_hidden_ptr": "*bf16",
            "rows_out": "i32",
            "vocabulary": "i32",
            "width": "i32",
            "weight_stride": "i32",
            "d_hidden_stride": "i32",
        },
        constants={},
        candidates={
            **{gpu: [{"BLOCK_D": d, "num_warps": w, "num_stages": 1} for d, w in ((2048, 8), (1024, 4), (4096, 8))] for gpu in GPUS},
            "interpreter": [{"BLOCK_D": 16, "num_warps": 1, "num_stages": 1}],
        },
        rows="supervised",
        divisible=frozenset({"width", "weight_stride", "d_hidden_stride"}),
    )


KERNELS = tuning.by_name(
    (
        tuning.Kernel(
            name="masked_linear_cross_entropy.row",
            function=_loss_row,
            signature=_LOSS_ROW_SIGNATURE,
            constants={"WANTS_GRADIENT": True, "ONE_BLOCK": True, "BLOCK_V": LARGEST_ROW},
            candidates={
                **{gpu: [{"num_warps": w, "num_stages": 1} for w in (32, 16)] for gpu in GPUS},
                "interpreter": [{"num_warps": 1, "num_stages": 1}],
            },
            rows="supervised",
            divisible=frozenset({"vocabulary", "logits_stride", "gradient_stride"}),
        ),
        tuning.Kernel(
            name="masked_linear_cross_entropy.long_row",
            function=_loss_row,
            signature=_LOSS_ROW_SIGNATURE,
            constants={"WANTS_GRADIENT": True, "ONE_BLOCK": False},
            candidates={
                **{gpu: [{"BLOCK_V": v, "num_warps": w, "num_stages": 1} for v, w in ((4096, 16), (2048, 8), (8192, 32))] for gpu in GPUS},
                "interpreter": [{"BLOCK_V": 1024, "num_warps": 1, "num_stages": 1}],
            },
            rows="supervised",
            divisible=frozenset({"vocabulary", "logits_stride", "gradient_stride"}),
        ),
        _scatter_kernel("scatter_row", "*bf16"),
        _scatter_kernel("scatter_row_master", "*fp32"),
        tuning.Kernel(
            name="masked_linear_cross_entropy.scale",
            function=_scale,
            signature={"gradient_ptr": "*fp32", "grad_loss_ptr": "*fp32", "elements": "i32"},
            constants={},
            candidates={
                **{
                    gpu: [{"BLOCK": 8192, "num_warps": 8, "num_stages": 1}, {"BLOCK": 4096, "num_warps": 8, "num_stages": 1}]
                    for gpu in GPUS
                },
                # The interpreter takes 3 ms a block: small gradients are one, those of a whole vocabulary many.
                "interpreter": [{"BLOCK": 1024, "num_warps": 1, "num_stages": 1}],
            },
            rows="supervised",
            divisible=frozenset({"elements"}),
        ),
    )
)
