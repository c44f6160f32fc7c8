"""What the norms have in common: their custom ops, and the statistics of a row in plain PyTorch where no kernel runs.

Rows are all axes but the last; shape letters: N rows, D columns.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllava_kernels.contract import custom_op


def define(name: str, forward: Callable[..., Any], backward: Callable[..., Any], streams: int = 1, statistics: bool = True) -> Any:
    """Define the op fastllava::`name` with fake and autograd, over ops of both passes.

    forward(x for each stream, parameters [D], eps): a result in x's shape for each stream, then, with `statistics`, as many of them
    [N] as there are parameters. backward(a gradient for each result, what was normed, the weight, statistics or else eps, whether
    parameters want gradients): the one gradient of every stream, then one for each parameter, empty where none is wanted. With two
    streams it is their sum that is normed, the second result.
    """
    op, backward_op = custom_op(name)(forward), custom_op(f"{name}_backward")(backward)
    parameters = len(inspect.signature(forward).parameters) - streams - 1

    @op.register_fake
    def _(*inputs: Any) -> Any:
        x = inputs[0]
        results = [_like(x) for _ in range(streams)]
        if statistics:
            rows = math.prod(x.shape[:-1])
            results += [x.new_empty(rows, dtype=dtype_of_statistics(x)) for _ in range(parameters)]
        return tuple(results) if len(results) > 1 else results[0]

    @backward_op.register_fake
    def _(*given: Any) -> tuple[Tensor, ...]:
        normed, weight, wants_parameters = given[streams], given[streams + 1], given[-1]
        return _like(normed), *(weight.new_empty(weight.shape if wants_parameters else 0) for _ in range(parameters))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = list(output) if isinstance(output, tuple) else [output]
        ctx.save_for_backward(results[1] if streams > 1 else inputs[0], inputs[streams], *results[streams:])
        ctx.mark_non_differentiable(*results[streams:])
        ctx.eps = () if statistics else (inputs[-1],)

    def gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wants = ctx.needs_input_grad[streams:-1]
        d_x, *d_parameters = backward_op(*grads[:streams], *ctx.saved_tensors, *ctx.eps, any(wants))
        return *[d_x] * streams, *(d_parameters if any(wants) else [None] * len(wants)), None

    op.register_autograd(gradients, setup_context=keep)
    return op


def dtype_of_statistics(x: Tensor) -> torch.dtype:
    """Return fp32, in which norms keep their statistics, or fp64 for fp64 on a CPU."""
    return torch.promote_types(x.dtype, torch.float32)


def rows_of(x: Tensor) -> Tensor:
    """Return x as rows, [N, D], in the dtype of the statistics."""
    return x.flatten(0, -2).to(dtype_of_statistics(x))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute (normed in x's shape and dtype, 1 / rms [N]), rounded before the weight as Llama's norm is."""
    wide_ND, rstd_N = rows_of(x), rstd_of(x, eps)
    return weight_D * (wide_ND * rstd_N.unsqueeze(1)).to(x.dtype).view(x.shape), rstd_N


def rstd_of(x: Tensor, eps: float) -> Tensor:
    """Return 1 / rms of every row, [N]."""
    return torch.rsqrt(rows_of(x).square().mean(-1) + eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight_D: Tensor, rstd_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x, [N, D], and of the weight, [D], both in the dtype of the statistics."""
    grad_ND = grad.flatten(0, -2).to(rstd_N.dtype)
    normed_ND = x.flatten(0, -2).to(rstd_N.dtype) * rstd_N.unsqueeze(1)
    scaled_ND = grad_ND * weight_D
    d_x = rstd_N.unsqueeze(1) * (scaled_ND - normed_ND * (scaled_ND * normed_ND).mean(-1, keepdim=True))
    return d_x, (grad_ND * normed_ND).sum(0)


def mean_and_rstd_of(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / deviation of every row, each [N]."""
    wide_ND = rows_of(x)
    mean_N = wide_ND.mean(-1)
    return mean_N, torch.rsqrt((wide_ND - mean_N.unsqueeze(1)).square().mean(-1) + eps)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight_D: Tensor, mean_N: Tensor, rstd_N: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of x, in its shape and dtype, and, when wanted, of weight and bias in the dtype of the statistics."""
    grad_ND = rows_of(grad)
    normed_ND = (rows_of(x) - mean_N.unsqueeze(1)) * rstd_N.unsqueeze(1)
    scaled_ND = grad_ND * weight_D
    along_ND = normed_ND * (scaled_ND * normed_ND).mean(-1, keepdim=True)
    d_x = (rstd_N.unsqueeze(1) * (scaled_ND - scaled_ND.mean(-1, keepdim=True) - along_ND)).to(x.dtype).view(x.shape)
    return (d_x, (grad_ND * normed_ND).sum(0), grad_ND.sum(0)) if wants_weight else (d_x, None, None)


def or_none(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Return the gradient in the parameter's dtype, or the empty tensor that stands for none."""
    return parameter.new_empty(0) if gradient is None else gradient.to(parameter.dtype)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
