"""The kernels' arithmetic of masked_linear_cross_entropy in plain PyTorch, on any device."""

import torch
from torch import Tensor

from fastllava_kernels.indices import inside, or_else


def loss_rows(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, gradient_NV: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """Compute losses and residuals of a chunk, logit gradients into `gradient` (chunked.LossRows); overwrites the logits.

    With c the row's largest logit, y the target and S the sum of exp(z_v - c) over v != y: the loss is
    (c - z_y) + log(exp(z_y - c) + S), and the target's gradient -S / (exp(z_y - c) + S), which is p_y - 1 without the
    subtraction. So rows with p_y up to 1 keep all their digits. A target that is none of the vocabulary makes the row NaN.
    """
    vocabulary = logits_NV.shape[1]
    targets = or_else(targets_N, vocabulary, 0).unsqueeze(1)
    target_logits = logits_NV.gather(1, targets)
    largest = logits_NV.amax(1, keepdim=True)
    others = logits_NV.sub_(largest).exp_().scatter_(1, targets, 0.0)
    total = others.sum(1, keepdim=True)
    target = (target_logits - largest).exp()
    weights = torch.where(inside(targets_N, vocabulary), weights_N, torch.nan).to(total.dtype).unsqueeze(1)
    # exp(z_y - c) is 1 where the target is the largest, and there log1p keeps what log would lose.
    log_sum = torch.where(target_logits == largest, torch.log1p(total), torch.log(target + total))
    losses = weights * (largest - target_logits + log_sum)
    if not wants_gradient:
        return losses.squeeze(1), torch.zeros_like(losses).squeeze(1)
    norm = weights / (target + total)
    exact = -total * norm
    gradient = others.mul_(norm).scatter_(1, targets, exact)
    if gradient_NV.dtype != gradient.dtype:
        gradient_NV.copy_(gradient)
    residual = exact - gradient_NV.gather(1, targets)
    return losses.squeeze(1), residual.squeeze(1)


def scale(gradient: Tensor, grad_loss: Tensor) -> None:
    """Multiply a gradient in place."""
    gradient.mul_(grad_loss)


def scatter_rows(
    d_rows_MD: Tensor,
    residual_M: Tensor,
    grad_loss: Tensor,
    weight_VD: Tensor,
    supervised_rows: Tensor,
    targets_M: Tensor,
    d_hidden_TD: Tensor,
) -> None:
    """Write `grad_loss * (d_rows + residual * weight[targets])` to the supervised rows of d_hidden, rounded once.

    NaN where the target is none of the vocabulary; what belongs to no row of d_hidden is NaN already, and goes to the first.
    """
    vocabulary = weight_VD.shape[0]
    target_rows = weight_VD.index_select(0, or_else(targets_M, vocabulary, 0)).to(d_hidden_TD.dtype)
    residual = torch.where(inside(targets_M, vocabulary), residual_M, torch.nan)
    complete = torch.addcmul(d_rows_MD, residual.unsqueeze(1), target_rows.to(d_rows_MD.dtype)) * grad_loss
    d_hidden_TD.index_copy_(0, or_else(supervised_rows, d_hidden_TD.shape[0], 0), complete.to(d_hidden_TD.dtype))
