"""The custom op of masked_linear_cross_entropy, with fake and autograd, over what computes a chunk: `kernel_loss_rows` or `eager`.

The gradients are formed in forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllava_kernels.contract import custom_op
from fastllava_kernels.mm32 import mm32

from . import chunked


def define(name: str, code: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Return the function of implementation `name`: a custom op of that name, with another one for its backward.

    code(tensor): the module whose `loss_rows`, `scatter_rows` and `scale` compute where the tensor lies.
    """

    @custom_op(f"masked_linear_cross_entropy_{name}")
    def forward(
        hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, wants_hidden: bool, wants_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        loss_rows = code(hidden).loss_rows
        return tuple(chunked.forward(hidden, weight, rows, targets, weights, wants_hidden, wants_weight, loss_rows))  # type: ignore[return-value]

    @forward.register_fake
    def _(
        hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, wants_hidden: bool, wants_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        count, (vocabulary, width) = rows.shape[0], weight.shape
        keeps = wants_weight and chunked.keeps_logit_gradients(count, width, hidden.dtype)
        return (
            hidden.new_empty((), dtype=wide),
            hidden.new_empty((count if wants_hidden else 0, width), dtype=wide),
            hidden.new_empty(count if wants_hidden else 0, dtype=wide),
            hidden.new_empty((vocabulary if wants_weight and not keeps else 0, width), dtype=wide),
            hidden.new_empty(count if keeps else 0, width),
            hidden.new_empty_strided((count, vocabulary), (chunked.padded(vocabulary), 1)) if keeps else hidden.new_empty(0, vocabulary),
            hidden.new_empty(1 if chunked.is_scaled(hidden.dtype, wants_hidden or wants_weight) else 0, dtype=wide),
        )

    @custom_op(f"masked_linear_cross_entropy_{name}_backward")
    def backward(
        grad_loss: Tensor,
        d_rows: Tensor,
        residual: Tensor,
        d_weight: Tensor,
        kept_rows: Tensor,
        d_logits: Tensor,
        scale: Tensor,
        weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        total_rows: int,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        # Nothing saved is written to: a graph that is kept gives the same gradients again.
        if scale.shape[0]:
            grad_loss = grad_loss / scale[0]
        d_hidden = kept_rows.new_zeros(total_rows if wants_hidden else 0, weight.shape[1])
        if wants_hidden and d_rows.shape[0]:
            code(kept_rows).scatter_rows(d_rows, residual, grad_loss, weight, rows, targets, d_hidden)
        if not wants_weight:
            return d_hidden, weight.new_empty(0, weight.shape[1])
        if d_weight.shape[0]:
            return d_hidden, (d_weight * grad_loss).to(weight.dtype)
        d_weight = mm32(d_logits.t(), kept_rows)
        code(kept_rows).scale(d_weight, grad_loss)
        return d_hidden, d_weight.to(weight.dtype)

    @backward.register_fake
    def _(
        grad_loss: Tensor,
        d_rows: Tensor,
        residual: Tensor,
        d_weight: Tensor,
        kept_rows: Tensor,
        d_logits: Tensor,
        scale: Tensor,
        weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        total_rows: int,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        vocabulary, width = weight.shape
        return kept_rows.new_empty(total_rows if wants_hidden else 0, width), weight.new_empty(vocabulary if wants_weight else 0, width)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, rows, targets, *_ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], weight, rows, targets)
        ctx.total_rows = hidden.shape[0]

    def differentiate(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden, d_weight = backward(grad_loss, *ctx.saved_tensors, ctx.total_rows, wants_hidden, wants_weight)
        return (d_hidden if wants_hidden else None, d_weight if wants_weight else None, None, None, None, None, None)

    forward.register_autograd(differentiate, setup_context=save)

    def masked_linear_cross_entropy(
        hidden_TD: Tensor, weight_VD: Tensor, supervised_rows: Tensor, targets_M: Tensor, weights_M: Tensor
    ) -> Tensor:
        wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_TD, weight_VD)]
        return forward(hidden_TD, weight_VD, supervised_rows, targets_M, weights_M, *wants)[0]

    return masked_linear_cross_entropy
