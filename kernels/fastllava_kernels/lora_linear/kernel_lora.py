"""Triton kernels of lora_linear: the low-rank products behind a dropout, each with the mask drawn where it is used.

T rows, D columns, n layers of rank R. The number of layers is an argument, so that q, k, v and gate, up and down run the same code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels._device.drops import kept
from fastllava_kernels._device.launch import cdiv, inner_contiguous, on_device_of, power_of_2
from fastllava_kernels._tuning import tuning


@triton.jit
def _correction(below) -> Any:
    return 65536.0 / (65536 - below).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "layers", "below"])
def shrink_kernel(
    x_ptr,
    A_ptr,
    keys_ptr,
    streams_ptr,
    h_ptr,
    rows,
    columns,
    layers,
    below,
    x_stride,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Write h [T, n, R] = drop(x) @ A.T. Programs that read the same rows follow one another."""
    parts = layers * tl.cdiv(RANK, BLOCK_R)
    part = tl.program_id(0) % parts
    layer = part // tl.cdiv(RANK, BLOCK_R)
    row = (tl.program_id(0) // parts) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = (part % tl.cdiv(RANK, BLOCK_R)) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Rows beyond the end repeat the last one; they are not stored.
    there = tl.minimum(row, rows - 1).to(tl.int64)
    keys, stream = tl.load(keys_ptr + there), tl.load(streams_ptr + layer)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + there[:, None] * x_stride + inner[None, :]
    A_ptrs = A_ptr + (layer * RANK + tl.minimum(r, RANK - 1)).to(tl.int64)[None, :] * columns + inner[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, columns, BLOCK_K):
        if EVEN:
            x, a = tl.load(x_ptrs), tl.load(A_ptrs)
        else:
            x = tl.load(x_ptrs, mask=inner[None, :] < columns - start, other=0.0)
            a = tl.load(A_ptrs, mask=inner[:, None] < columns - start, other=0.0)
        seen = tl.where(kept(keys, stream, start, below, BLOCK_K), x, 0.0)
        sums = tl.dot(seen, a, sums, input_precision="ieee")
        x_ptrs += BLOCK_K
        A_ptrs += BLOCK_K
    at = (row.to(tl.int64)[:, None] * layers + layer) * RANK + r[None, :]
    h = (sums * _correction(below)).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + at, h, mask=(row < rows)[:, None] & (r < RANK)[None, :])


@triton.jit(do_not_specialize=["rows", "layers", "below"])
def input_kernel(
    d_h_ptr,
    A_ptr,
    keys_ptr,
    streams_ptr,
    d_x_ptr,
    rows,
    columns,
    layers,
    below,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Add to d_x [T, D], contiguous, what it gets through d_h [T, n, R] of all layers, of each where its mask has kept x."""
    across = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % across) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    there = tl.minimum(row, rows - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_R)
    left = tl.zeros((BLOCK_M, BLOCK_N // 2), tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK_N // 2), tl.float32)
    PARTS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    for step in range(layers * PARTS):
        layer = step // PARTS
        r = (step - layer * PARTS) * BLOCK_R + inner
        d_h_ptrs = d_h_ptr + (there[:, None] * layers + layer) * RANK + r[None, :]
        A_ptrs = A_ptr + (layer * RANK + r).to(tl.int64)[:, None] * columns + column[None, :]
        if EVEN and PARTS * BLOCK_R == RANK:
            d_h, a = tl.load(d_h_ptrs), tl.load(A_ptrs)
        else:
            d_h = tl.load(d_h_ptrs, mask=r[None, :] < RANK, other=0.0)
            a = tl.load(A_ptrs, mask=(r < RANK)[:, None] & (column < columns)[None, :], other=0.0)
        product = tl.dot(d_h, a, input_precision="ieee")
        # The left and the right half, one after the other: the numbers of both at once do not fit the registers.
        one, other = tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        keys, stream = tl.load(keys_ptr + there), tl.load(streams_ptr + layer)
        left += tl.where(kept(keys, stream, first, below, BLOCK_N // 2), one, 0.0)
        right += tl.where(kept(keys, stream, first + BLOCK_N // 2, below, BLOCK_N // 2), other, 0.0)
    total = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N))
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    if EVEN:
        inside = (row < rows)[:, None]
    else:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
    d_x = tl.load(d_x_ptr + at, mask=inside, other=0.0).to(tl.float32) + total * _correction(below)
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "layers", "below"])
def A_kernel(
    d_h_ptr,
    x_ptr,
    keys_ptr,
    streams_ptr,
    partial_ptr,
    rows,
    columns,
    layers,
    below,
    x_stride,
    RANK: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:
    """Write what each of PROGRAMS parts of the rows gives to the gradient of A: fp32 [PROGRAMS, n R, D]."""
    parts = layers * tl.cdiv(RANK, BLOCK_R)
    part = tl.program_id(0) % parts
    layer = part // tl.cdiv(RANK, BLOCK_R)
    r = (part % tl.cdiv(RANK, BLOCK_R)) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = (tl.program_id(0) // parts) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    stream = tl.load(streams_ptr + layer)
    sums = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    share = tl.cdiv(tl.cdiv(rows, BLOCK_K), PROGRAMS) * BLOCK_K
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, rows), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        there = tl.minimum(row, rows - 1).to(tl.int64)
        d_h_ptrs = d_h_ptr + (there[None, :] * layers + layer) * RANK + r[:, None]
        d_h = tl.load(d_h_ptrs, mask=(row < rows)[None, :] & (r < RANK)[:, None], other=0.0)
        x_ptrs = x_ptr + there[:, None] * x_stride + column[None, :]
        if EVEN:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=column[None, :] < columns, other=0.0)
        seen = tl.where(kept(tl.load(keys_ptr + there), stream, first, below, BLOCK_N), x, 0.0)
        sums = tl.dot(d_h, seen, sums, input_precision="ieee")
    at = ((tl.program_id(1) * layers + layer).to(tl.int64) * RANK + r)[:, None] * columns + column[None, :]
    tl.store(partial_ptr + at, sums * _correction(below), mask=(r < RANK)[:, None] & (column < columns)[None, :])


def shrink(x_TD: Tensor, A: Tensor, keys: Tensor, streams: Tensor, below: int) -> Tensor:
    """Compute h = drop(x) @ A.T of each layer, [T, n, R], of at least one row. A: [n R, D] in the dtype of x, contiguous."""
    x = inner_contiguous(x_TD)
    (rows, columns), layers, rank = x.shape, len(streams), len(A) // len(streams)
    h = x.new_empty(rows, layers, rank)
    config = _config("shrink", x, rank)
    grid = (cdiv(rows, config["BLOCK_M"]) * layers * cdiv(rank, config["BLOCK_R"]),)
    constants: dict[str, Any] = config | {"RANK": rank, "EVEN": columns % config["BLOCK_K"] == 0}
    with on_device_of(x):
        shrink_kernel[grid](x, A, keys.contiguous(), streams.contiguous(), h, rows, columns, layers, below, x.stride(0), **constants)
    return h


def add_to_input_gradient(d_x_TD: Tensor, d_h: Tensor, A: Tensor, keys: Tensor, streams: Tensor, below: int) -> None:
    """Add to d_x, contiguous, the gradient of x through each layer's h."""
    (rows, columns), (layers, rank) = d_x_TD.shape, d_h.shape[1:]
    config = _config("input", d_x_TD, rank)
    grid = (cdiv(rows, config["BLOCK_M"]) * cdiv(columns, config["BLOCK_N"]),)
    constants: dict[str, Any] = config | {"RANK": rank, "EVEN": columns % config["BLOCK_N"] == 0}
    with on_device_of(d_x_TD):
        input_kernel[grid](d_h, A, keys.contiguous(), streams.contiguous(), d_x_TD, rows, columns, layers, below, **constants)


def A_gradient(d_h: Tensor, x_TD: Tensor, keys: Tensor, streams: Tensor, below: int) -> Tensor:
    """Compute the gradient of A, [n R, D], as fp32 sums over parts of the rows, which are added in their order: the same every time."""
    x = inner_contiguous(x_TD)
    (rows, columns), (layers, rank) = x.shape, d_h.shape[1:]
    config = _config("A", x, rank)
    partial = x.new_empty(config["PROGRAMS"], layers * rank, columns, dtype=torch.float32)
    grid = cdiv(columns, config["BLOCK_N"]) * layers * cdiv(rank, config["BLOCK_R"]), config["PROGRAMS"]
    constants: dict[str, Any] = config | {"RANK": rank, "EVEN": columns % config["BLOCK_N"] == 0}
    with on_device_of(x):
        A_kernel[grid](d_h, x, keys.contiguous(), streams.contiguous(), partial, rows, columns, layers, below, x.stride(0), **constants)
    return partial.sum(0)


SMALLEST = 16
"""The least that a tensor core's product takes of each size."""


def _config(name: str, x: Tensor, rank: int) -> dict[str, int]:
    chosen = tuning.config(KERNELS[f"lora_linear.{name}"], x.shape[0], x.device)
    if x.is_cuda and x.dtype is torch.float32:
        chosen |= {key: value for key, value in _FP32.items() if key in chosen}
    return chosen | {"BLOCK_R": min(chosen["BLOCK_R"], max(SMALLEST, power_of_2(rank)))}


# In fp32 the product is no tensor core's: tiles made for those take minutes to compile and more memory than there is.
_FP32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "BLOCK_R": 64, "num_warps": 4, "num_stages": 2}

_POINTERS = ("x_ptr", "A_ptr", "d_h_ptr", "d_x_ptr", "h_ptr")
_SIGNATURE: Mapping[str, str] = {
    **dict.fromkeys(_POINTERS, "*bf16"),
    **dict.fromkeys(("keys_ptr", "streams_ptr"), "*i64"),
    "partial_ptr": "*fp32",
    **dict.fromkeys(("rows", "columns", "layers", "below", "x_stride"), "i32"),
}


def _blocks(warps: int, stages: int, **sizes: int) -> Mapping[str, int]:
    return {**sizes, "num_warps": warps, "num_stages": stages}


_SHRINK = [
    _blocks(16, 3, BLOCK_M=128, BLOCK_K=64, BLOCK_R=128),
    _blocks(8, 3, BLOCK_M=64, BLOCK_K=64, BLOCK_R=128),
    _blocks(8, 3, BLOCK_M=128, BLOCK_K=64, BLOCK_R=128),
]
_INPUT = [_blocks(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_R=128), _blocks(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_R=128)]
_A = [
    _blocks(8, 3, BLOCK_R=128, BLOCK_N=128, BLOCK_K=32, PROGRAMS=8),
    _blocks(8, 3, BLOCK_R=128, BLOCK_N=128, BLOCK_K=64, PROGRAMS=8),
    _blocks(16, 3, BLOCK_R=128, BLOCK_N=128, BLOCK_K=64, PROGRAMS=8),
]
# An A100's products take their operands from registers: only in blocks of 16 warps do they leave room for 16 on a multiprocessor.
_CANDIDATES: Mapping[str, Mapping[str, Sequence[tuning.Config]]] = {
    "sm_90": {"shrink": _SHRINK, "input": _INPUT, "A": _A},
    "sm_80": {"shrink": _SHRINK, "input": _INPUT, "A": _A[::-1]},
    "interpreter": {
        "shrink": [_blocks(1, 1, BLOCK_M=32, BLOCK_K=32, BLOCK_R=32)],
        "input": [_blocks(1, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_R=32)],
        "A": [_blocks(1, 1, BLOCK_R=32, BLOCK_N=32, BLOCK_K=32, PROGRAMS=2)],
    },
}


def _described(name: str, function: Any) -> tuning.Kernel:
    signature = {key: kind for key, kind in _SIGNATURE.items() if key in function.arg_names}
    return tuning.Kernel(
        name=f"lora_linear.{name}",
        function=function,
        signature=signature,
        constants={"RANK": 128, "EVEN": True},
        candidates={arch: found[name] for arch, found in _CANDIDATES.items()},
        rows="rows",
        divisible=frozenset({"columns", "x_stride"}) & frozenset(signature),
        unaligned={"EVEN": False},
        matmul=True,
    )


KERNELS = tuning.by_name((_described("shrink", shrink_kernel), _described("input", input_kernel), _described("A", A_kernel)))
