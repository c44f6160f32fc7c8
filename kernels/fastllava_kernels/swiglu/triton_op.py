"""Implementation `triton` of swiglu: our kernels, whose backward writes beside its inputs, where Liger's writes over copies of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels._device.launch import needs_gpu, takes
from fastllava_kernels.contract import custom_op
from fastllava_kernels.room import Implementation

from .reference import swiglu


@custom_op("swiglu_triton")
def swiglu_triton(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Compute `silu(gate) * up`, [T, F] in the inputs' dtype, rounded once."""
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    if not takes(gate_TF):
        return swiglu(gate_TF, up_TF)
    from . import kernel_swiglu

    return kernel_swiglu.forward(gate_TF, up_TF)


@swiglu_triton.register_fake
def _(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return torch.empty_like(gate_TF, memory_format=torch.contiguous_format)


@custom_op("swiglu_triton_backward")
def swiglu_triton_backward(grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up."""
    grad_TF, gate_TF, up_TF = grad_TF.contiguous(), gate_TF.contiguous(), up_TF.contiguous()
    if not takes(gate_TF):
        return torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF), grad_TF * F.silu(gate_TF)
    from . import kernel_swiglu

    return kernel_swiglu.backward(grad_TF, gate_TF, up_TF)


@swiglu_triton_backward.register_fake
def _(grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    d_gate_TF, d_up_TF = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate_TF, up_TF))
    return d_gate_TF, d_up_TF


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_triton_backward(grad_TF, *ctx.saved_tensors)


swiglu_triton.register_autograd(_gradients, setup_context=_keep)

IMPLEMENTATION = Implementation(swiglu_triton, needs_gpu, interpretable=True)
