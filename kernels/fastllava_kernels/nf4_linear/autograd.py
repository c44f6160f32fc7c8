"""The custom op of nf4_linear, with fake and autograd, over what dequantises a part of the weight: `kernel_dequantise` or plain PyTorch.

Backward finds the quantised weight, which is there anyway, on the op itself and not among what autograd saves: what computes a layer again
for what was saved need not come to this op.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastllava_kernels._device import nf4
from fastllava_kernels.contract import custom_op
from fastllava_kernels.nf4 import Nf4


def define(name: str, part: Callable[[Tensor], nf4.Part]) -> Callable[..., Tensor]:
    """Return the function of implementation `name`: a custom op, with another one for its backward.

    part(tensor): what dequantises a part of a weight where the tensor lies.
    """

    @custom_op(f"nf4_linear_{name}")
    def forward(x_TD: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, bias_F: Tensor | None) -> Tensor:
        """Compute `x @ dequantised.T + bias`."""
        return nf4.forward(part(x_TD), x_TD, Nf4(codes, absmax, nested_absmax, offset), bias_F)

    @forward.register_fake
    def _(x_TD, codes, absmax, nested_absmax, offset, bias_F):
        return x_TD.new_empty(x_TD.shape[0], codes.shape[0])

    @custom_op(f"nf4_linear_{name}_backward")
    def backward(d_out_TF: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
        """Compute the gradient of x."""
        return nf4.input_gradient(part(d_out_TF), d_out_TF, Nf4(codes, absmax, nested_absmax, offset))

    @backward.register_fake
    def _(d_out_TF, codes, absmax, nested_absmax, offset):
        return d_out_TF.new_empty(d_out_TF.shape[0], 2 * codes.shape[1])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight = inputs[1:5]

    def run_backward(ctx: Any, d_out_TF: Tensor) -> tuple[Tensor | None, ...]:
        d_x_TD = backward(d_out_TF, *ctx.weight) if ctx.needs_input_grad[0] else None
        return d_x_TD, None, None, None, None, None

    forward.register_autograd(run_backward, setup_context=setup_context)

    def nf4_linear(x_TD: Tensor, codes: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, bias_F: Tensor | None) -> Tensor:
        return forward(x_TD, codes, absmax, nested_absmax, offset, bias_F)

    return nf4_linear
