"""Recompute: which results of a decoder layer are kept for backward, and which are computed again from those.

Values kept per row of a layer by the ops that run on a GPU, in the compute dtype, and the products that backward repeats.
D width, Q = query heads x head width, G = key/value heads x head width, F width of the MLP; 7B: D = Q = G = 4096, F = 11008.

               kept                                                                     7B, bf16   repeated (7B: Mflop)
    none       x, q, k, v, attention, o_proj's added to x, gate, up: 2 D + 2 Q + 2 G + 2 F  93.2 kB   nothing
               if the decoder trains, both norms' results and swiglu's: 2 D + F more     131.6 kB   nothing
    norms      x, q, k, v, attention, o_proj's, gate, up: 2 D + 2 Q + 2 G + 2 F           93.2 kB   no product
    selective  x, q, k, v, attention, o_proj's: 2 D + 2 Q + 2 G                           49.2 kB   gate, up (180)
    full       x: D                                                                        8.2 kB   all but down_proj (315)

x is the sum that the layer before ends with, which is added up in this layer's first norm: what repeats a layer begins after that.
So at 16,384 rows 7B keeps 64.3, 45.5, 24 and 4 GiB in stage finetune. A frozen decoder keeps no input of a linear, and `norms`
gives it nothing back. Of an MPT "gate, up" is up, q, k and v are one product, and have ALiBi's columns besides.

Why these: a byte of a product's result saves n operations, for an input of width n. That is D for all products but down_proj,
whose result no backward reads. At one price what counts is size: gate and up are the two largest and near the matrix units' peak, so
`selective` repeats them and keeps six values of width D. A byte of attention's result saves L operations in a sample of L rows, at
perhaps 0.4 of the peak: from about 1600 rows on it is dearer to repeat than a product. It is kept at every length, so that what a
policy costs does not depend on the data.

What is computed again has the same bits, so loss and gradients are those of `none`, bit for bit, without torch.compile.
"""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint, create_selective_checkpoint_contexts

from fastllava.config import Recompute

_PRODUCTS = {"aten::mm", "aten::addmm", "aten::_scaled_mm"}
_ADAPTED = re.compile(r"fastllava::lora_linear_(?!.*_hidden$)")
"""An op with a product for each of the layers whose biases are its third argument."""
_QUANTISED = "fastllava::nf4_linear_"
"""An op with one product."""
_ATTENTION = ("fastllava::attention_", "aten::_scaled_dot_product_", "torch_attn::")


def run_layers(layers: nn.ModuleList, x_TD: Tensor, packing: Any, recompute: Recompute, wanted: Tensor | None) -> Tensor:
    """Run decoder layers one after another: [T, D]; with `wanted`, int64 [M], [M, D] of these rows, which are all that the last computes.

    Without gradients there is nothing to `recompute`.
    """
    recompute = recompute if torch.is_grad_enabled() else "none"
    residual_TD = None
    for index, layer in enumerate(layers, start=1):
        x_TD, residual_TD = layer(x_TD, residual_TD, packing, wanted if index == len(layers) else None, recompute)
    return x_TD if residual_TD is None else x_TD + residual_TD


def compute_layer(
    layer: Any, x_TD: Tensor, residual_TD: Tensor | None, packing: Any, wanted: Tensor | None, recompute: Recompute
) -> tuple[Tensor, Tensor]:
    """Compute a decoder layer of `x + residual`: two tensors whose sum is its result.

    What is computed again is within a graph of this, and within the time that shards are gathered for.
    """
    if recompute == "none":
        return layer.transform(*layer.norm_input(x_TD, residual_TD), packing, wanted)
    products = layer.kept_products(recompute, wanted)
    if torch.compiler.is_compiling() or not layer.sums_in_norm:
        # A graph keeps what goes into the part that it repeats, and plain PyTorch more of a norm than its sum.
        summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
        return recomputed(partial(_from_sum, layer), recompute, products, summed_TD, packing, wanted)
    normed = _Normed(layer, *layer.norm_input(x_TD, residual_TD))
    return recomputed(normed.transform, recompute, products, packing, wanted, first=normed.compute_again)


def _from_sum(layer: Any, summed_TD: Tensor, packing: Any, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
    return layer.transform(*layer.norm_input(summed_TD, None), packing, wanted)


class _Normed:
    """The norm that a layer begins with, whose sum is kept for what computes the layer again; the norm itself is not."""

    def __init__(self, layer: Any, normed_TD: Tensor, summed_TD: Tensor) -> None:
        self._layer, self._summed_TD, self._in_graph = layer, summed_TD, normed_TD.requires_grad
        self._normed_TD: Tensor | None = normed_TD

    def transform(self, packing: Any, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        normed_TD, self._normed_TD = self._normed_TD, None
        return self._layer.transform(normed_TD, self._summed_TD, packing, wanted)

    def compute_again(self) -> None:
        """Norm the sum again without a graph, as only the values are needed."""
        with torch.no_grad():
            self._normed_TD = self._layer.norm_input(self._summed_TD, None)[0].requires_grad_(self._in_graph)


def recomputed(
    function: Callable[..., Any], recompute: Recompute, products: int, *args: Any, first: Callable[[], None] | None = None
) -> Any:
    """`function(*args)` of a decoder layer, of whose results backward finds those that `recompute` keeps; not for "none".

    `products`: how many of the matrix products it keeps, the first ones; none with "full". `first`: what backward does before it calls
    `function` again.
    """
    # No random numbers are drawn in a layer, so their state need not be kept.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute != "full" or first is not None:
        settings["context_fn"] = partial(_contexts, recompute, products, first)
    return checkpoint(function, *args, **settings)


def _contexts(recompute: Recompute, products: int, first: Callable[[], None] | None) -> tuple[Any, Any]:
    selective = recompute != "full"
    forward, again = create_selective_checkpoint_contexts(_Kept(products)) if selective else (nullcontext(), nullcontext())
    return forward, again if first is None else _After(first, again)


class _After:
    """Enters `context` after a call of `first`, as often as backward goes through a graph that is retained."""

    def __init__(self, first: Callable[[], None], context: AbstractContextManager[Any]) -> None:
        self._first, self._context = first, context

    def __enter__(self) -> None:
        self._first()
        self._context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)


class _Kept:
    """Keeps attention and the first so many matrix products of one pass through a layer."""

    def __init__(self, products: int) -> None:
        self.products, self.seen = products, Counter[bool]()

    def __call__(self, context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name().partition(".")[0]
        keep = name.startswith(_ATTENTION)
        adapted = _ADAPTED.match(name) is not None
        if adapted or name in _PRODUCTS or name.startswith(_QUANTISED):
            # Some versions of PyTorch ask again while they compute again.
            self.seen[context.is_recompute] += len(args[2]) if adapted else 1
            keep = self.seen[context.is_recompute] <= self.products
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
