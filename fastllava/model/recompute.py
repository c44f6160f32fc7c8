"""Recompute: which results of a decoder layer are kept for backward, and which are computed again from those.

Values kept per row of a layer by the ops that run on a GPU, in the compute dtype, and the products that backward repeats.
D width, Q = query heads x head width, G = key/value heads x head width, F width of the MLP; 7B: D = Q = G = 4096, F = 11008.

               kept                                                                     7B, bf16   repeated (7B: Mflop)
    none       x, q, k, v, attention, o_proj's added to x, gate, up: 2 D + 2 Q + 2 G + 2 F  93.2 kB   nothing
               if the decoder trains, both norms' results and swiglu's: 2 D + F more     131.6 kB   nothing
    norms      x, q, k, v, attention, o_proj's, gate, up: 2 D + 2 Q + 2 G + 2 F           93.2 kB   no product
    selective  x, q, k, v, attention, o_proj's: 2 D + 2 Q + 2 G                           49.2 kB   gate, up (180)
    full       x: D                                                                        8.2 kB   all but down_proj (315)

So at 16,384 rows 7B keeps 64.3, 45.5, 24 and 4 GiB in stage finetune. A frozen decoder keeps no input of a linear, and `norms`
gives it nothing back. Of an MPT "gate, up" is up, q, k and v are one product, and have ALiBi's columns besides.

Why these: a byte of a product's result saves n operations, for an input of width n. That is D for all products but down_proj,
whose result no backward reads. At one price what counts is size: gate and up are the two largest and near the matrix units' peak, so
`selective` repeats them and keeps six values of width D. A byte of attention's result saves L operations in a sample of L rows, at
perhaps 0.4 of the peak: from about 1600 rows on it is dearer to repeat than a product. It is kept at every length, so that what a
policy costs does not depend on the data.

The same kernels run again, so loss and gradients are those of `none`, bit for bit, without torch.compile.
"""

import re
from collections import Counter
from collections.abc import Callable
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
    for index, layer in enumerate(layers, start=1):
        x_TD = layer(x_TD, packing, wanted if index == len(layers) else None, recompute)
    return x_TD


def compute_layer(layer: Any, x_TD: Tensor, packing: Any, wanted: Tensor | None, recompute: Recompute) -> Tensor:
    """Compute a decoder layer. What is computed again is within a graph of this, and within the time that shards are gathered for."""
    if recompute == "none":
        return layer.transform(x_TD, packing, wanted)
    return recomputed(layer.transform, recompute, layer.kept_products(recompute, wanted), x_TD, packing, wanted)


def recomputed(function: Callable[..., Any], recompute: Recompute, products: int, *args: Any) -> Any:
    """`function(*args)` of a decoder layer, of whose results backward finds those that `recompute` keeps; not for "none".

    `products`: how many of the matrix products it keeps, the first ones; none with "full".
    """
    # No random numbers are drawn in a layer, so their state need not be kept.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute != "full":
        settings["context_fn"] = partial(_contexts, products)
    return checkpoint(function, *args, **settings)


def _contexts(products: int) -> Any:
    return create_selective_checkpoint_contexts(_Kept(products))


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
