"""Implementation `liger` of swiglu: Liger's kernels with two reads and a write a pass, nothing kept but the inputs."""

from typing import Any

import torch
from torch import Tensor

from fastllava_kernels._device import liger
from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels.contract import custom_op
from fastllava_kernels.room import Implementation

from .reference import swiglu


@custom_op("swiglu_liger")
def swiglu_liger(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Compute `silu(gate) * up`, [T, F] in the inputs' dtype; silu in fp32, rounded before it is multiplied."""
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    if not liger.takes(gate_TF):
        return swiglu(gate_TF, up_TF)
    from liger_kernel.ops.swiglu import swiglu_forward

    with on_device_of(gate_TF):
        return swiglu_forward(gate_TF, up_TF)[2]


@swiglu_liger.register_fake
def _(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return torch.empty_like(gate_TF, memory_format=torch.contiguous_format)


@custom_op("swiglu_liger_backward")
def swiglu_liger_backward(grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up."""
    grad_TF = grad_TF.contiguous()
    # Liger writes the gradients over the inputs, which belong to whoever computed them.
    gate_TF, up_TF = (x.clone(memory_format=torch.contiguous_format) for x in (gate_TF, up_TF))
    if not liger.takes(gate_TF):
        return torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF), grad_TF * torch.nn.functional.silu(gate_TF)
    from liger_kernel.ops.swiglu import swiglu_backward

    with on_device_of(gate_TF):
        return swiglu_backward(gate_TF, up_TF, grad_TF)


@swiglu_liger_backward.register_fake
def _(grad_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(gate_TF, memory_format=torch.contiguous_format),
        torch.empty_like(up_TF, memory_format=torch.contiguous_format),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_liger_backward(grad_TF, *ctx.saved_tensors)


swiglu_liger.register_autograd(_gradients, setup_context=_keep)

IMPLEMENTATION = Implementation(swiglu_liger, liger.needs_liger)
