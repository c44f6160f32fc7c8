"""The custom op of projector_splice, with fake and autograd, over what computes its steps: `kernel_place` or `eager`.

Saved for backward are the inputs and what goes into each GELU, which the epilogue of the backward product takes again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastllava_kernels._device import mlp
from fastllava_kernels.contract import custom_op


def define(name: str, code: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Return the function of implementation `name`: a custom op, with another one for its backward.

    code(tensor): the module whose `linear_gelu`, `place`, `gather_rows`, `gelu_backward` and `embedding_gradient` compute where
    the tensor lies.
    """

    @custom_op(f"projector_splice_{name}")
    def forward(
        features: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        embedding: Tensor,
        token_ids: Tensor,
        text_rows: Tensor,
        patch_rows: Tensor,
        keep: bool,
    ) -> list[Tensor]:
        """Return the packed hidden states, then, if `keep`, what goes into each GELU."""
        steps = code(features)
        x, pres = mlp.hidden_layers(steps.linear_gelu, features, weights, biases, keep)
        last = (mlp.as_used(weights[-1], x.dtype), biases[-1].contiguous()) if weights else (None, None)
        return [steps.place(x, *last, embedding, token_ids, text_rows, patch_rows), *pres]

    @forward.register_fake
    def _(features, weights, biases, embedding, token_ids, text_rows, patch_rows, keep):
        pres = [features.new_empty(features.shape[0], weight.shape[0]) for weight in weights[:-1]]
        return [features.new_empty(token_ids.shape[0], embedding.shape[1]), *(pres if keep else [])]

    @custom_op(f"projector_splice_{name}_backward")
    def backward(
        d_hidden: Tensor,
        features: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        pres: Sequence[Tensor],
        embedding: Tensor,
        token_ids: Tensor,
        text_rows: Tensor,
        patch_rows: Tensor,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """Compute the gradients of embedding, features, weights, biases; empty where not wanted."""
        steps = code(features)
        if wanted[0]:
            d_embedding = steps.embedding_gradient(d_hidden, embedding, token_ids, text_rows)
        else:
            d_embedding = embedding.new_empty(0)
        if not any(wanted[1:]):
            return [d_embedding, *(x.new_empty(0) for x in (features, *weights, *biases))]
        d_out, d_out_sum = steps.gather_rows(d_hidden, patch_rows, bool(weights))
        return [d_embedding, *mlp.backward(steps.gelu_backward, d_out, d_out_sum, features, weights, biases, pres, wanted[1:])]

    @backward.register_fake
    def _(d_hidden, features, weights, biases, pres, embedding, token_ids, text_rows, patch_rows, wanted):
        inputs = [embedding, features, *weights, *biases]
        return [x.new_empty(x.shape if want else 0) for x, want in zip(inputs, wanted, strict=True)]

    def setup_context(ctx, inputs, output) -> None:
        features, weights, biases, embedding, token_ids, text_rows, patch_rows, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.layers = len(weights)
        ctx.save_for_backward(features, embedding, token_ids, text_rows, patch_rows, *weights, *biases, *output[1:])

    def run_backward(ctx, grads):
        features, embedding, token_ids, text_rows, patch_rows, *rest = ctx.saved_tensors
        count = ctx.layers
        weights, biases, pres = rest[:count], rest[count : 2 * count], rest[2 * count :]
        of_features, of_weights, of_biases, of_embedding = ctx.needs_input_grad[:4]
        wanted = [of_embedding, of_features, *of_weights, *of_biases]
        found = backward(grads[0], features, weights, biases, pres, embedding, token_ids, text_rows, patch_rows, wanted)
        d_embedding, d_features, *d_layers = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        return d_features, d_layers[:count], d_layers[count:], d_embedding, None, None, None, None

    forward.register_autograd(run_backward, setup_context=setup_context)

    def projector_splice(
        features_PC: Tensor,
        layers: Sequence[tuple[Tensor, Tensor]],
        embedding_VD: Tensor,
        token_ids_T: Tensor,
        text_rows: Tensor,
        patch_rows: Tensor,
    ) -> Tensor:
        weights, biases = [weight for weight, _ in layers], [bias for _, bias in layers]
        keep = mlp.keeps(features_PC, weights, biases)
        return forward(features_PC, weights, biases, embedding_VD, token_ids_T, text_rows, patch_rows, keep)[0]

    return projector_splice
