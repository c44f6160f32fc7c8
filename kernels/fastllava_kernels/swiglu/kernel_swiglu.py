"""Triton kernels of swiglu: silu(gate) * up and its backward, each input read once and each result written once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels._device.launch import cdiv, on_device_of
from fastllava_kernels._tuning import tuning


@triton.jit
def _forward(gate_ptr, up_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=at < elements)


@triton.jit
def _backward(grad_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=at < elements)
    tl.store(d_up_ptr + at, (grad * gate * sigmoid).to(d_up_ptr.dtype.element_ty), mask=at < elements)


def forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Compute `silu(gate) * up`, [T, F], of contiguous inputs."""
    out_TF = torch.empty_like(gate_TF)
    _launch("swiglu.forward", _forward, gate_TF, up_TF, out_TF)
    return out_TF


def backward(grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up, of contiguous inputs."""
    d_gate_TF, d_up_TF = torch.empty_like(gate_TF), torch.empty_like(up_TF)
    _launch("swiglu.backward", _backward, grad_TF, gate_TF, up_TF, d_gate_TF, d_up_TF)
    return d_gate_TF, d_up_TF


def _launch(name: str, function: Any, *tensors: Tensor) -> None:
    elements = tensors[0].numel()
    if not elements:
        return
    config = tuning.config(KERNELS[name], tensors[0].shape[0], tensors[0].device)
    with on_device_of(tensors[0]):
        function[(cdiv(elements, config["BLOCK"]),)](*tensors, elements, **config)


def _kernel(name: str, function: Any, pointers: tuple[str, ...]) -> tuning.Kernel:
    gpu = [{"BLOCK": block, "num_warps": warps, "num_stages": 1} for block, warps in ((4096, 8), (2048, 8), (1024, 4))]
    return tuning.Kernel(
        name=name,
        function=function,
        signature={**dict.fromkeys(pointers, "*bf16"), "elements": "i32"},
        constants={},
        candidates={"sm_80": gpu, "sm_90": gpu, "interpreter": [{"BLOCK": 16, "num_warps": 1, "num_stages": 1}]},
        rows="rows",
        divisible=frozenset({"elements"}),
    )


KERNELS = tuning.by_name(
    (
        _kernel("swiglu.forward", _forward, ("gate_ptr", "up_ptr", "out_ptr")),
        _kernel("swiglu.backward", _backward, ("grad_ptr", "gate_ptr", "up_ptr", "d_gate_ptr", "d_up_ptr")),
    )
)
