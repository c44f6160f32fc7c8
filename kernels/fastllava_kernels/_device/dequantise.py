"""Triton kernel that dequantises rows and columns of an NF4 weight, for the rooms that multiply by one.

The rooms launch it under their own names. Each byte of codes is read once, each weight is written once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels._device.launch import cdiv, on_device_of
from fastllava_kernels._device.nf4 import sizes
from fastllava_kernels._tuning import tuning
from fastllava_kernels.nf4 import BLOCK, NESTED_BLOCK, Nf4, code, nested_code


@triton.jit(do_not_specialize=["blocks", "first", "across", "stride", "elements"])
def dequantise_kernel(
    codes_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    code_ptr,
    nested_code_ptr,
    out_ptr,
    blocks,
    first,
    across,
    stride,
    elements,
    DOUBLE: tl.constexpr,
    EVEN: tl.constexpr,
    SIZE: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Write `blocks` blocks of SIZE weights, `across` of them a row; rows are `stride` blocks apart and begin with the block `first`.

    EVEN: they are whole; else the last one ends with the last of `elements` weights.
    """
    at = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = at < blocks
    source = (first + (at // across) * stride + at % across).to(tl.int64)
    pairs = source[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    to = at.to(tl.int64)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    if EVEN:
        packed = tl.load(codes_ptr + pairs, mask=inside[:, None], other=0)
    else:
        written = at.to(tl.int64)[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
        packed = tl.load(codes_ptr + pairs, mask=written < elements // 2, other=0)
    if DOUBLE:
        index = tl.load(absmax_ptr + source, mask=inside, other=0).to(tl.int32)
        value = tl.load(nested_code_ptr + index, mask=inside, other=0.0)
        scale = value * tl.load(nested_absmax_ptr + source // NESTED_SIZE, mask=inside, other=0.0)
        # The product is rounded before the mean is added, as plain PyTorch does it: nothing becomes one with what is chosen.
        scale = tl.where(inside, scale, 0.0) + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + source, mask=inside, other=0.0)
    values = tl.load(code_ptr + tl.arange(0, 16))
    packed = packed.to(tl.int32)
    high = tl.gather(values, tl.ravel(packed >> 4), 0)
    low = tl.gather(values, tl.ravel(packed & 15), 0)
    weights = tl.reshape(tl.interleave(high, low), (BLOCKS, SIZE)) * scale[:, None]
    if EVEN:
        tl.store(out_ptr + to, weights.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(out_ptr + to, weights.to(out_ptr.dtype.element_ty), mask=to < elements)


class Dequantise:
    """The kernels of a room that multiplies by NF4 weights: `kernels` by name, and what launches them."""

    def __init__(self, room: str, rows: str) -> None:
        """rows: what the shapes of the room's workload call a size that grows with the weight or with what it is multiplied by."""
        self._room = room
        self.kernels = tuning.by_name(_described(f"{room}.{name}", double, rows) for name, double in _NAMES.items())

    def part(self, weight: Nf4, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """Dequantise rows and columns of a weight, contiguous, in fp32, fp16 or bf16. Columns are whole blocks, or all of them."""
        (outputs, inputs), codes = sizes(weight), weight.codes.contiguous()
        out = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=dtype, device=codes.device)
        if not out.numel():
            return out
        blocks = cdiv(out.numel(), BLOCK)
        if inputs % BLOCK:
            # Blocks go on across the ends of rows: all of them are one row.
            first, across, stride = rows.start * inputs // BLOCK, blocks, 0
        else:
            stride, across = inputs // BLOCK, out.shape[1] // BLOCK
            first = rows.start * stride + columns.start // BLOCK
        double = weight.absmax.dtype is torch.uint8
        kernel = self.kernels[f"{self._room}.{'dequantise_double' if double else 'dequantise'}"]
        config = tuning.config(kernel, outputs, codes.device)
        tables = code(codes.device), nested_code(codes.device)
        with on_device_of(codes):
            dequantise_kernel[(cdiv(blocks, config["BLOCKS"]),)](
                codes, weight.absmax, weight.nested_absmax, weight.offset, *tables, out, blocks, first, across, stride, out.numel(),
                **config, **_constants(double, out.numel() % BLOCK == 0),
            )  # fmt: skip
        return out


_NAMES = {"dequantise": False, "dequantise_double": True}


def _constants(double: bool, even: bool) -> dict[str, Any]:
    return {"DOUBLE": double, "EVEN": even, "SIZE": BLOCK, "NESTED_SIZE": NESTED_BLOCK}


def _described(name: str, double: bool, rows: str) -> tuning.Kernel:
    # A thread takes 4 bytes of codes in the first, and writes 8 weights, 16 bytes of bf16.
    gpu = [{"BLOCKS": blocks, "num_warps": warps, "num_stages": 1} for blocks, warps in ((32, 8), (64, 8), (64, 4), (128, 8))]
    pointers = ("absmax_ptr", "nested_absmax_ptr", "offset_ptr", "code_ptr", "nested_code_ptr")
    return tuning.Kernel(
        name=name,
        function=dequantise_kernel,
        signature={
            "codes_ptr": "*u8",
            **dict.fromkeys(pointers, "*fp32"),
            **({"absmax_ptr": "*u8"} if double else {}),
            "out_ptr": "*bf16",
            **dict.fromkeys(("blocks", "first", "across", "stride", "elements"), "i32"),
        },
        constants=_constants(double, True),
        candidates={"sm_80": gpu, "sm_90": gpu, "interpreter": [{"BLOCKS": 16, "num_warps": 1, "num_stages": 1}]},
        rows=rows,
        unaligned={"EVEN": False},
    )
