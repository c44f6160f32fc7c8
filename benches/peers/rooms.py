"""What others would run in place of a room, beside it in the results: each as its users call it."""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benches.lib.judging import leaves
from fastllava_kernels import Room
from fastllava_kernels.room import REFERENCE, runs_anywhere

IGNORED = -100
"""The label of a row that is not supervised, for everyone but us."""

OLDEST_QUACK = (9, 0)


Unsupported = Callable[[torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Bound:
    """A function with its arguments in it, and the tensors that its gradients are taken of."""

    function: Callable[[], Any]
    leaves: Sequence[Tensor]
    bound_only: bool = False
    """Computes less than the op, as a lower bound of its time: there is nothing to judge."""


@dataclass(frozen=True)
class Peer:
    """Something to time on a room's arguments.

    `build(args)`, untimed, makes of them what its users hold already, such as labels for every row.
    """

    summary: str
    build: Callable[[tuple[Any, ...]], Bound]
    unsupported: Unsupported = runs_anywhere


def peers(room: Room) -> dict[str, Peer]:
    """The peers of a room by name; those that are no implementation of it already."""
    found: dict[str, Peer] = {}
    if "compiled" not in room.implementations:
        reference = room.implementations[REFERENCE]
        found["torch_compile"] = Peer(
            "torch.compile of the reference",
            functools.partial(_compiled, reference.function),
            lambda device, dtype: reference.untraceable or _needs_cuda(device, dtype),
        )
    return {**found, **PEERS.get(room.name, {})}


def _compiled(reference: Callable[..., Any], args: tuple[Any, ...]) -> Bound:
    compiled = torch.compile(reference)
    return Bound(lambda: compiled(*args), leaves(args))


def _needs_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "it is measured on a CUDA GPU only"


def _needs(package: str) -> Unsupported:
    """Say what is missing: the package, or a GPU."""

    def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
        return _needs_cuda(device, dtype)

    return unsupported


# masked_linear_cross_entropy: others take a label for every row.


def _labels(args: tuple[Any, ...]) -> Tensor:
    """int64 [T]. The peers' mean is our sum because the weights are 1 / M."""
    hidden_TD, _, supervised_rows, targets_M, _ = args
    labels_T = torch.full((hidden_TD.shape[0],), IGNORED, device=hidden_TD.device)
    labels_T[supervised_rows.long()] = targets_M
    return labels_T


def _every_row(loss: Callable[[Tensor, Tensor, Tensor], Tensor], args: tuple[Any, ...]) -> Bound:
    """`loss(hidden, weight, labels)`, the weight rounded to hidden's dtype if it is a master."""
    hidden_TD, weight_VD = args[:2]
    labels_T = _labels(args)
    return Bound(lambda: loss(hidden_TD, weight_VD.to(hidden_TD.dtype), labels_T), leaves(args))


def _loss_peer(summary: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor], unsupported: Unsupported = runs_anywhere) -> Peer:
    return Peer(summary, functools.partial(_every_row, loss), unsupported)


def _liger_loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden_TD, weight_VD, labels_T, None, None, IGNORED)[0]


def _torch_loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    function: Any = getattr(F, "linear_cross_entropy")  # noqa: B009 (PyTorch 2.11 may not have it)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions")  # noqa: B009
    return function(hidden_TD, weight_VD, labels_T, ignore_index=IGNORED, options=options())


def _no_torch_loss(device: torch.device, dtype: torch.dtype) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"PyTorch {torch.__version__} has no chunked F.linear_cross_entropy"


def _apple_loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index=IGNORED, reduction="mean")


def _quack_loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return chunked_linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index=IGNORED, reduction="mean")


def _no_quack(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _needs("quack")(device, dtype)
    if reason is None and torch.cuda.get_device_capability(device) < OLDEST_QUACK:
        return "it needs compute capability 9.0 or newer"
    return reason


CHUNK = 256
"""Rows of a chunk, as TRL's default."""


def _dropped_and_chunked(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """What TRL calls chunked_nll: rows without a label dropped by a mask, the rest in chunks that backward computes again."""
    kept = labels_T != IGNORED
    hidden_MD, targets_M = hidden_TD[kept], labels_T[kept]

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight_VD).float(), targets, reduction="sum")

    losses = [
        checkpoint(chunk, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_MD.split(CHUNK), targets_M.split(CHUNK), strict=True)
    ]
    return torch.stack(losses).sum() / targets_M.shape[0]


# projector_splice: what transformers' LLaVA does, and the products alone.


def _masked_scatter(args: tuple[Any, ...]) -> Bound:
    """Every id is embedded, those of images as any other; then the projected patches are scattered over them."""
    features_PC, layers, embedding_VD, token_ids_T, _, patch_rows = args
    image = embedding_VD.shape[0]
    marked_T = token_ids_T.clone()
    marked_T[patch_rows.long()] = image

    def forward() -> Tensor:
        projected = features_PC
        for index, (weight, bias) in enumerate(layers):
            projected = F.linear(F.gelu(projected) if index else projected, weight.to(projected.dtype), bias.to(projected.dtype))
        hidden_TD = F.embedding(token_ids_T, embedding_VD).to(projected.dtype)
        mask_TD = (marked_T == image).unsqueeze(-1).expand_as(hidden_TD)
        return hidden_TD.masked_scatter(mask_TD, projected)

    return Bound(forward, leaves(args))


class _Products(torch.autograd.Function):
    """The two products of a two-layer projector, and in backward the three that it needs; nothing between them."""

    @staticmethod
    def forward(ctx: Any, features_PC: Tensor, first_HC: Tensor, inner_PH: Tensor, second_DH: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(features_PC, inner_PH, second_DH)
        return inner_PH @ second_DH.T, features_PC @ first_HC.T

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor, None, Tensor]:
        features_PC, inner_PH, second_DH = ctx.saved_tensors
        upstream_PD = upstream[0]
        return None, (upstream_PD @ second_DH).T @ features_PC, None, upstream_PD.T @ inner_PH


def _gemms(args: tuple[Any, ...]) -> Bound:
    features_PC, layers = args[:2]
    first_HC, second_DH = (weight.detach().to(features_PC.dtype).requires_grad_() for weight, _ in layers)
    inner_PH = torch.randn(features_PC.shape[0], second_DH.shape[1], device=features_PC.device).to(features_PC.dtype)
    return Bound(lambda: _Products.apply(features_PC, first_HC, inner_PH, second_DH), [first_HC, second_DH], bound_only=True)


GEMMS = Peer("its matrix products alone, in its dtype, by PyTorch: a lower bound", _gemms)

PEERS: Mapping[str, Mapping[str, Peer]] = {
    "masked_linear_cross_entropy": {
        "liger_flce": _loss_peer("Liger's fused linear cross-entropy, every row", _liger_loss, _needs("liger_kernel")),
        "torch_flce": _loss_peer("F.linear_cross_entropy in chunks, every row", _torch_loss, _no_torch_loss),
        "apple_cce": _loss_peer("Apple's cut cross-entropy", _apple_loss, _needs("cut_cross_entropy")),
        "quack": _loss_peer("QuACK's chunked linear cross-entropy, every row", _quack_loss, _no_quack),
        "chunked_nll": _loss_peer("TRL's way: labelled rows in checkpointed chunks", _dropped_and_chunked),
    },
    "projector_splice": {
        "masked_scatter": Peer("transformers' LLaVA: embed every id, masked_scatter the patches", _masked_scatter),
        "gemms": GEMMS,
    },
    "projector_mlp": {"gemms": GEMMS},
}
