"""Implementation `varlen` of attention: PyTorch's varlen_attn, by FlashAttention 2."""

from inspect import signature
from typing import Any

from torch import Tensor

from fastllava_kernels.room import Implementation

from .availability import needs_flash, needs_width_of_flash
from .flash import Packed, activate, define


class Varlen:
    """PyTorch's torch.nn.attention.varlen.varlen_attn by the FlashAttention that `switch` names; None is PyTorch's own."""

    def __init__(self, switch: str | None) -> None:
        self.switch = switch

    def forward(self, given: Packed) -> tuple[Tensor, Tensor]:
        """Compute (attention [T, H, K], log of the sum of exponentials [H, T] in fp32)."""
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        activate(self.switch)
        q_THK, k_TGK, v_TGK, bounds, longest, causal = given
        # PyTorch 2.11 takes grouped heads without being told, and has no such argument.
        grouped = q_THK.shape[1] != k_TGK.shape[1] and "enable_gqa" in signature(varlen_attn).parameters
        options: dict[str, Any] = {"return_aux": AuxRequest(lse=True), "window_size": _window(causal)}
        options |= {"enable_gqa": True} if grouped else {}
        out_THK, lse_HT = varlen_attn(q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest, **options)
        return out_THK, lse_HT

    def backward(self, grad_THK: Tensor, given: Packed, out_THK: Tensor, lse_HT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of q, k and v."""
        # Importing it defines the ops.
        import torch.nn.attention.varlen

        activate(self.switch)
        q_THK, k_TGK, v_TGK, bounds, longest, causal = given
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q_THK.device)
        return torch.ops.torch_attn._varlen_attn_backward(
            grad_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, bounds, bounds, longest, longest,
            causal, no_dropout, None, list(_window(causal)),
        )  # fmt: skip


def _window(causal: bool) -> tuple[int, int]:
    """Return the rows seen before and after a row; -1 is all. varlen_attn is causal when nothing after is seen."""
    return (-1, 0) if causal else (-1, -1)


IMPLEMENTATION = Implementation(define("varlen", Varlen(None)), needs_flash, needs_width_of_flash)
