"""The custom op of splice, with fake and autograd, over what computes its steps: `kernel_rows` or `eager`.

Not materialised: text embeddings apart from the result, padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastllava_kernels.contract import custom_op


def define(name: str, code: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Return the function of implementation `name`: a custom op, with another one for its backward.

    code(tensor): the module whose `splice`, `gather_rows` and `embedding_gradient` compute where the tensor lies.
    """

    @custom_op(f"splice_{name}")
    def forward(projected: Tensor, embedding: Tensor, token_ids: Tensor, text_rows: Tensor, patch_rows: Tensor) -> Tensor:
        return code(projected).splice(projected, embedding, token_ids, text_rows, patch_rows)

    @forward.register_fake
    def _(projected, embedding, token_ids, text_rows, patch_rows):
        return projected.new_empty(token_ids.shape[0], embedding.shape[1])

    @custom_op(f"splice_{name}_backward")
    def backward(
        d_hidden: Tensor, embedding: Tensor, token_ids: Tensor, text_rows: Tensor, patch_rows: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor]:
        """Compute the gradients of projected and of the embedding; empty where not wanted."""
        steps = code(d_hidden)
        of_projected, of_embedding = wanted
        return [
            steps.gather_rows(d_hidden, patch_rows, False)[0] if of_projected else d_hidden.new_empty(0),
            steps.embedding_gradient(d_hidden, embedding, token_ids, text_rows) if of_embedding else embedding.new_empty(0),
        ]

    @backward.register_fake
    def _(d_hidden, embedding, token_ids, text_rows, patch_rows, wanted):
        of_projected, of_embedding = wanted
        return [
            d_hidden.new_empty(patch_rows.shape[0], d_hidden.shape[1]) if of_projected else d_hidden.new_empty(0),
            embedding.new_empty(embedding.shape if of_embedding else 0),
        ]

    def setup_context(ctx, inputs, output) -> None:
        _, *others = inputs
        ctx.save_for_backward(*others)

    def run_backward(ctx, d_hidden):
        wanted = list(ctx.needs_input_grad[:2])
        found = backward(d_hidden, *ctx.saved_tensors, wanted)
        d_projected, d_embedding = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        return d_projected, d_embedding, None, None, None

    forward.register_autograd(run_backward, setup_context=setup_context)
    return forward
