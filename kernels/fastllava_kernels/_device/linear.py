"""Triton kernels of a chain of Linear and GELU: Linear with GELU, Linear whose rows go to their place, the backward through a GELU.

The rooms with a projector launch them under their own names. Sizes: M rows, N output features, K input features. Weights come in
the compute dtype, contiguous; sums are fp32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels._device.gelu import gelu, gelu_and_slope
from fastllava_kernels._device.launch import cdiv, inner_contiguous, on_device_of
from fastllava_kernels._tuning import tuning

_YES, _NO = tl.constexpr(True), tl.constexpr(False)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr) -> Any:
    """Return this program's rows, first column and row block. Blocks of GROUP_M row blocks keep what they share of both operands in L2."""
    program = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (program // group_size) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    block_m = first + (program % group_size) % height
    block_n = (program % group_size) // height
    return block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N, block_m


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    block_m,
    column,
    M,
    N,
    K,
    a_stride,
    b_stride,
    B_IS_NK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    """Compute a [M, K] times b, which is stored as [N, K] or as [K, N]: fp32 [BLOCK_M, BLOCK_N].

    TMA: whole tiles are copied by descriptors, for which rows begin at multiples of 16 bytes; what is beyond an end is 0.
    """
    if TMA:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [a_stride, 1], [BLOCK_M, BLOCK_K])  # pyright: ignore[reportArgumentType]
        if B_IS_NK:
            b_tiles = tl.make_tensor_descriptor(b_ptr, [N, K], [b_stride, 1], [BLOCK_N, BLOCK_K])  # pyright: ignore[reportArgumentType]
        else:
            b_tiles = tl.make_tensor_descriptor(b_ptr, [K, N], [b_stride, 1], [BLOCK_K, BLOCK_N])  # pyright: ignore[reportArgumentType]
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            a = a_tiles.load([block_m * BLOCK_M, start])  # pyright: ignore[reportArgumentType]
            if B_IS_NK:
                b = tl.trans(b_tiles.load([column, start]))  # pyright: ignore[reportArgumentType]
            else:
                b = b_tiles.load([start, column])  # pyright: ignore[reportArgumentType]
            sums = tl.dot(a, b, sums, input_precision="ieee")
        return sums
    rows, columns = block_m * BLOCK_M + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    # Rows beyond the end repeat the last one, so that the loop needs no mask for them; they are not stored.
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * a_stride + inner[None, :]
    if B_IS_NK:
        b_ptrs = b_ptr + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * b_stride + inner[:, None]
    else:
        b_ptrs = b_ptr + inner.to(tl.int64)[:, None] * b_stride + columns[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=inner[None, :] < K - start, other=0.0)
        if B_IS_NK or EVEN_N:
            if EVEN_K:
                b = tl.load(b_ptrs)
            else:
                b = tl.load(b_ptrs, mask=inner[:, None] < K - start, other=0.0)
        else:
            b = tl.load(b_ptrs, mask=(inner[:, None] < K - start) & (columns[None, :] < N), other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K if B_IS_NK else BLOCK_K * b_stride
    return sums


@triton.jit
def _halves(sums, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> Any:
    """Return the left and the right columns. An epilogue on one after the other needs half the registers, and so does not spill."""
    return tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _store_linear(
    sums,
    rows,
    places,
    columns,
    N,
    rows_out,
    M,
    bias_ptr,
    pre_ptr,
    out_ptr,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    if SPLITS > 0:
        left, right = _halves(sums, BLOCK_M, WIDTH)
        first = columns
        _store_linear(left, rows, places, first, N, rows_out, M, bias_ptr, pre_ptr, out_ptr, GELU, KEEP, SPLITS - 1, BLOCK_M, WIDTH // 2)
        second = columns + WIDTH // 2
        _store_linear(right, rows, places, second, N, rows_out, M, bias_ptr, pre_ptr, out_ptr, GELU, KEEP, SPLITS - 1, BLOCK_M, WIDTH // 2)
    else:
        at_n = columns + tl.arange(0, WIDTH)
        inside_n = at_n < N
        # The bias is rounded to the compute dtype as the weight was.
        bias = tl.load(bias_ptr + at_n, mask=inside_n, other=0.0).to(out_ptr.dtype.element_ty).to(tl.float32)
        sums += bias[None, :]
        if GELU:
            if KEEP:
                at = rows.to(tl.int64)[:, None] * N + at_n[None, :]
                tl.store(pre_ptr + at, sums.to(pre_ptr.dtype.element_ty), mask=(rows < M)[:, None] & inside_n[None, :])
            sums = gelu(sums)
        at = places[:, None] * N + at_n[None, :]
        tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=(places < rows_out)[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["M", "rows_out"])
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    pre_ptr,
    out_ptr,
    map_ptr,
    M,
    N,
    K,
    rows_out,
    x_stride,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
    PLACE: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Compute out = x @ weight.T + bias; GELU: its GELU, with what goes into it into pre if KEEP; PLACE: row m to out[map[m]]."""
    rows, column, block_m = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    sums = _product(x_ptr, weight_ptr, block_m, column, M, N, K, x_stride, K, _YES, _YES, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
    if PLACE:
        places = tl.load(map_ptr + rows, mask=rows < M, other=rows_out).to(tl.int64)
        # Below 0 is no row either.
        places = tl.where(places < 0, rows_out, places)
    else:
        places = rows.to(tl.int64)
    _store_linear(sums, rows, places, column, N, rows_out, M, bias_ptr, pre_ptr, out_ptr, GELU, KEEP, SPLITS, BLOCK_M, BLOCK_N)


@triton.jit
def _store_gelu_backward(
    sums,
    rows,
    columns,
    block_m,
    M,
    N,
    pre_ptr,
    d_pre_ptr,
    act_ptr,
    partial_ptr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    if SPLITS > 0:
        left, right = _halves(sums, BLOCK_M, WIDTH)
        first = columns
        _store_gelu_backward(left, rows, first, block_m, M, N, pre_ptr, d_pre_ptr, act_ptr, partial_ptr, SPLITS - 1, BLOCK_M, WIDTH // 2)
        second = columns + WIDTH // 2
        _store_gelu_backward(right, rows, second, block_m, M, N, pre_ptr, d_pre_ptr, act_ptr, partial_ptr, SPLITS - 1, BLOCK_M, WIDTH // 2)
    else:
        at_n = columns + tl.arange(0, WIDTH)
        inside = (rows < M)[:, None] & (at_n < N)[None, :]
        at = rows.to(tl.int64)[:, None] * N + at_n[None, :]
        act, slope = gelu_and_slope(tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(act_ptr + at, act.to(act_ptr.dtype.element_ty), mask=inside)
        d_pre = tl.where(inside, sums * slope, 0.0)
        tl.store(d_pre_ptr + at, d_pre.to(d_pre_ptr.dtype.element_ty), mask=inside)
        tl.store(partial_ptr + block_m.to(tl.int64) * N + at_n, tl.sum(d_pre, axis=0), mask=at_n < N)


@triton.jit(do_not_specialize=["M"])
def gelu_backward_kernel(
    d_out_ptr,
    weight_ptr,
    pre_ptr,
    d_pre_ptr,
    act_ptr,
    partial_ptr,
    M,
    N,
    K,
    d_out_stride,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Compute d_pre = (d_out @ weight) * GELU'(pre), act = GELU(pre), and the sums of d_pre over each block of rows.

    d_out: [M, K] and weight: [K, N] of the Linear after the GELU; pre, d_pre, act: [M, N]; partial: fp32 [blocks of M, N].
    """
    rows, column, block_m = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    sums = _product(d_out_ptr, weight_ptr, block_m, column, M, N, K, d_out_stride, N, _NO, EVEN_N, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
    _store_gelu_backward(sums, rows, column, block_m, M, N, pre_ptr, d_pre_ptr, act_ptr, partial_ptr, SPLITS, BLOCK_M, BLOCK_N)


class LinearKernels:
    """The kernels of a room that computes a chain of Linear and GELU: `kernels` by name, and what launches each."""

    def __init__(self, room: str, names: Sequence[str]) -> None:
        self._room = room
        self.kernels = tuning.by_name(_described(f"{room}.{name}", name) for name in names)

    def linear_gelu(self, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Compute (pre, GELU(pre)), both [M, N], with pre = x @ weight.T + bias; pre is empty unless `keep`.

        The GELU is taken of the fp32 sums, before pre is rounded. The bias may have any dtype.
        """
        act_MN = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
        pre_MN = torch.empty_like(act_MN) if keep else x_MK.new_empty(0)
        self._linear("linear_gelu" if keep else "linear_gelu_only", x_MK, weight_NK, bias_N, pre_MN, act_MN, None)
        return pre_MN, act_MN

    def linear(self, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
        """Compute x @ weight.T + bias, [M, N]."""
        out_MN = x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])
        self._linear("linear", x_MK, weight_NK, bias_N, out_MN, out_MN, None)
        return out_MN

    def linear_place(self, x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor, places_M: Tensor, out: Tensor) -> None:
        """Write row m of x @ weight.T + bias into row places[m] of `out` [rows, N], contiguous, if that is a row of it."""
        self._linear("linear_place", x_MK, weight_NK, bias_N, out, out, places_M)

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, out: Tensor, places: Tensor | None) -> None:
        (m, k), n = x.shape, weight.shape[0]
        if not m:
            return
        x = inner_contiguous(x)
        config = self._config(name, x)
        constants: dict[str, Any] = {
            **config,
            **VARIANTS[name],
            "EVEN_K": k % config["BLOCK_K"] == 0,
            "TMA": _by_descriptors(config, x, weight),
        }
        with on_device_of(x):
            linear_kernel[_grid(m, n, config)](
                x, weight, bias, pre, out, x if places is None else places.contiguous(), m, n, k, out.shape[0], x.stride(0),
                **constants,
            )  # fmt: skip

    def gelu_backward(self, d_out_MK: Tensor, weight_KN: Tensor, pre_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (d_pre, GELU(pre), fp32 column sums of d_pre) with d_pre = (d_out @ weight) * GELU'(pre): [M, N], [M, N], [N]."""
        (m, k), n = d_out_MK.shape, weight_KN.shape[1]
        d_out = inner_contiguous(d_out_MK)
        d_pre_MN, act_MN = torch.empty_like(pre_MN), torch.empty_like(pre_MN)
        config = self._config("gelu_backward", d_out)
        partial_BN = pre_MN.new_empty(cdiv(m, config["BLOCK_M"]), n, dtype=torch.float32)
        even = {"EVEN_N": n % config["BLOCK_N"] == 0, "EVEN_K": k % config["BLOCK_K"] == 0}
        constants: dict[str, Any] = {**config, **even, "TMA": _by_descriptors(config, d_out, weight_KN)}
        with on_device_of(d_out):
            gelu_backward_kernel[_grid(m, n, config)](
                d_out, weight_KN, pre_MN, d_pre_MN, act_MN, partial_BN, m, n, k, d_out.stride(0),
                **constants,
            )  # fmt: skip
        return d_pre_MN, act_MN, partial_BN.sum(0)

    def _config(self, name: str, x: Tensor) -> dict[str, int]:
        chosen = tuning.config(self.kernels[f"{self._room}.{name}"], x.shape[0], x.device)
        return chosen | _FP32 if x.is_cuda and x.dtype is torch.float32 else chosen


def _by_descriptors(config: Mapping[str, int], *operands: Tensor) -> bool:
    """Whether tiles are copied by descriptors: where the configuration has them, and rows begin at multiples of 16 bytes."""
    if not config.get("TMA") or any((x.stride(0) * x.element_size()) % 16 or x.data_ptr() % 16 for x in operands):
        return False
    # What a thread that launches has to say, and autograd's has not.
    triton.set_allocator(_scratch)
    return True


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors of a launch, which PyTorch gives to no one before the stream is done with it."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _grid(m: int, n: int, config: Mapping[str, int]) -> tuple[int]:
    return (cdiv(m, config["BLOCK_M"]) * cdiv(n, config["BLOCK_N"]),)


# In fp32 the product is no tensor core's: tiles made for those take minutes to compile and more memory than there is.
_FP32 = {"TMA": False, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "SPLITS": 0, "num_warps": 4, "num_stages": 2}

VARIANTS: Mapping[str, Mapping[str, bool]] = {
    "linear_gelu": {"GELU": True, "KEEP": True, "PLACE": False},
    "linear_gelu_only": {"GELU": True, "KEEP": False, "PLACE": False},
    "linear": {"GELU": False, "KEEP": False, "PLACE": False},
    "linear_place": {"GELU": False, "KEEP": False, "PLACE": True},
}
"""The constants of `linear_kernel` by the name of the variant."""


def _tiles(m: int, n: int, k: int, splits: int, warps: int, stages: int) -> Mapping[str, int]:
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "SPLITS": splits}
    return tile | {"num_warps": warps, "num_stages": stages}


# 128x128 in 128 registers or fewer leaves room for a second block on each multiprocessor, whose products hide the epilogue.
_CANDIDATES = {
    "sm_90": [
        *(_tiles(128, 128, 64, 2, 8, 3), _tiles(128, 256, 64, 2, 8, 3), _tiles(128, 256, 64, 1, 8, 4), _tiles(128, 128, 64, 1, 8, 4)),
        # Tiles copied by descriptors.
        *({**_tiles(128, n, 64, 2, 8, 3), "TMA": 1} for n in (256, 128)),
    ],
    "sm_80": [
        *(_tiles(128, 128, 64, 1, 8, 3), _tiles(128, 128, 32, 1, 8, 4), _tiles(64, 128, 64, 1, 4, 3), _tiles(128, 128, 64, 2, 8, 3)),
        # Two blocks of 4 warps on a multiprocessor; then tiles that read less again. An epilogue on quarters, or they spill.
        *(_tiles(128, 128, 32, 2, 4, 4), _tiles(128, 128, 64, 2, 4, 3), _tiles(128, 256, 64, 2, 8, 3), _tiles(256, 128, 64, 2, 8, 3)),
    ],
    "interpreter": [_tiles(32, 32, 16, 1, 4, 1)],
}
_LINEAR_SIGNATURE = {
    **dict.fromkeys(("x_ptr", "weight_ptr", "pre_ptr", "out_ptr"), "*bf16"),
    "bias_ptr": "*fp32",
    "map_ptr": "*i32",
    **dict.fromkeys(("M", "N", "K", "rows_out", "x_stride"), "i32"),
}
_GELU_BACKWARD_SIGNATURE = {
    **dict.fromkeys(("d_out_ptr", "weight_ptr", "pre_ptr", "d_pre_ptr", "act_ptr"), "*bf16"),
    "partial_ptr": "*fp32",
    **dict.fromkeys(("M", "N", "K", "d_out_stride"), "i32"),
}


def _described(name: str, variant: str) -> tuning.Kernel:
    is_linear = variant in VARIANTS
    signature = _LINEAR_SIGNATURE if is_linear else _GELU_BACKWARD_SIGNATURE
    return tuning.Kernel(
        name=name,
        function=linear_kernel if is_linear else gelu_backward_kernel,
        signature=signature,
        constants={**(VARIANTS[variant] if is_linear else {"EVEN_N": True}), "EVEN_K": True, "TMA": False},
        candidates=_CANDIDATES,
        rows="patches",
        divisible=frozenset({"N", "K", "x_stride", "d_out_stride"}) & frozenset(signature),
        unaligned={"EVEN_K": False} if is_linear else {"EVEN_N": False, "EVEN_K": False},
        matmul=True,
    )
