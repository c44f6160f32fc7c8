"""Triton kernel of rope: queries and keys turned in one launch, each read once and written once.

Shape letters: T rows, H query heads, G key heads, K head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels._device.launch import on_device_of, power_of_2
from fastllava_kernels._tuning import tuning


@triton.jit
def _turn(x_ptr, out_ptr, heads, width, cos_1, cos_2, sin_1, sin_2, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Turn all heads of a row; the pairs are (i, i + K / 2)."""
    head, i = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_K)[None, :]
    half = width // 2
    at = head * width + i
    mask = (head < heads) & (i < half)
    first = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        # The transposed turn.
        out_1 = first * cos_1[None, :] + second * sin_2[None, :]
        out_2 = second * cos_2[None, :] - first * sin_1[None, :]
    else:
        out_1 = first * cos_1[None, :] - second * sin_1[None, :]
        out_2 = second * cos_2[None, :] + first * sin_2[None, :]
    tl.store(out_ptr + at, out_1.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + at + half, out_2.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_heads,
    k_heads,
    width,
    q_stride,
    k_stride,
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Turn one row of queries and keys."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_K)
    half = width // 2
    mask = i < half
    cos_1 = tl.load(cos_ptr + row * width + i, mask=mask, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + row * width + half + i, mask=mask, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + row * width + i, mask=mask, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + row * width + half + i, mask=mask, other=0.0).to(tl.float32)
    q_out_ptr += row * q_heads * width
    k_out_ptr += row * k_heads * width
    _turn(q_ptr + row * q_stride, q_out_ptr, q_heads, width, cos_1, cos_2, sin_1, sin_2, BACKWARD, BLOCK_H, BLOCK_K)
    _turn(k_ptr + row * k_stride, k_out_ptr, k_heads, width, cos_1, cos_2, sin_1, sin_2, BACKWARD, BLOCK_G, BLOCK_K)


def rotate(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by each row's angles, or for `backward` the gradients back, into new contiguous tensors."""
    q_THK, k_TGK = _heads_contiguous(q_THK), _heads_contiguous(k_TGK)
    rows, q_heads, width = q_THK.shape
    k_heads = k_TGK.shape[1]
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_TGK))
    if not rows:
        return q_out, k_out
    config = tuning.config(KERNELS["rope.backward" if backward else "rope.forward"], rows, q_THK.device)
    config |= {"BACKWARD": backward, "BLOCK_K": power_of_2(width // 2)}
    config |= {"BLOCK_H": power_of_2(q_heads), "BLOCK_G": power_of_2(k_heads)}
    with on_device_of(q_THK):
        _rotate[(rows,)](
            q_THK,
            k_TGK,
            cos_TK.contiguous(),
            sin_TK.contiguous(),
            q_out,
            k_out,
            q_heads,
            k_heads,
            width,
            q_THK.stride(0),
            k_TGK.stride(0),
            **config,
        )
    return q_out, k_out


def _heads_contiguous(x_THK: Tensor) -> Tensor:
    """Return x itself when the heads of a row lie one after another, wherever its rows lie; else a copy."""
    return x_THK if x_THK.stride()[1:] == (x_THK.shape[2], 1) else x_THK.contiguous()


def _kernel(name: str, backward: bool) -> tuning.Kernel:
    gpu = [{"num_warps": warps, "num_stages": 1} for warps in (4, 8, 2)]
    return tuning.Kernel(
        name=name,
        function=_rotate,
        signature={
            **dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr"), "*bf16"),
            **dict.fromkeys(("q_heads", "k_heads", "width", "q_stride", "k_stride"), "i32"),
        },
        # Vicuna 7B; 13B has 40 heads in blocks of 64.
        constants={"BACKWARD": backward, "BLOCK_H": 32, "BLOCK_G": 32, "BLOCK_K": 64},
        candidates={"sm_80": gpu, "sm_90": gpu, "interpreter": [{"num_warps": 1, "num_stages": 1}]},
        rows="rows",
        divisible=frozenset({"width", "q_stride", "k_stride"}),
    )


KERNELS = tuning.by_name((_kernel("rope.forward", backward=False), _kernel("rope.backward", backward=True)))
