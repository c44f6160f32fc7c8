"""The custom op of projector_mlp, with fake and autograd, over what computes its layers: `kernel_linear` or plain PyTorch.

Not materialised for backward: what comes out of each GELU, which the epilogue of the backward product makes again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastllava_kernels._device import mlp, plain
from fastllava_kernels.contract import custom_op


def define(name: str, code: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Return the function of implementation `name`: a custom op, with another one for its backward.

    code(tensor): the module whose `linear_gelu`, `linear` and `gelu_backward` compute where the tensor lies.
    """

    @custom_op(f"projector_mlp_{name}")
    def forward(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], keep: bool) -> list[Tensor]:
        """Return the projected patches, then, if `keep`, what goes into each GELU."""
        steps = code(features)
        x, pres = mlp.hidden_layers(steps.linear_gelu, features, weights, biases, keep)
        return [steps.linear(x, mlp.as_used(weights[-1], x.dtype), biases[-1].contiguous()), *pres]

    @forward.register_fake
    def _(features, weights, biases, keep):
        return [features.new_empty(features.shape[0], weight.shape[0]) for weight in (weights[-1], *(weights[:-1] if keep else ()))]

    @custom_op(f"projector_mlp_{name}_backward")
    def backward(
        d_projected: Tensor,
        features: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        pres: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """Compute the gradients of features, weights, biases; empty where not wanted."""
        sums = plain.column_sums(d_projected)
        return mlp.backward(code(features).gelu_backward, d_projected, sums, features, weights, biases, pres, wanted)

    @backward.register_fake
    def _(d_projected, features, weights, biases, pres, wanted):
        return [x.new_empty(x.shape if want else 0) for x, want in zip((features, *weights, *biases), wanted, strict=True)]

    def setup_context(ctx, inputs, output) -> None:
        features, weights, biases, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.layers = len(weights)
        ctx.save_for_backward(features, *weights, *biases, *output[1:])

    def run_backward(ctx, grads):
        features, *rest = ctx.saved_tensors
        count = ctx.layers
        of_features, of_weights, of_biases, _ = ctx.needs_input_grad
        wanted = [of_features, *of_weights, *of_biases]
        found = backward(grads[0], features, rest[:count], rest[count : 2 * count], rest[2 * count :], wanted)
        d_features, *d_layers = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        return d_features, d_layers[:count], d_layers[count:], None

    forward.register_autograd(run_backward, setup_context=setup_context)

    def projector_mlp(features_PC: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        if not layers:
            return features_PC
        weights, biases = [weight for weight, _ in layers], [bias for _, bias in layers]
        return forward(features_PC, weights, biases, mlp.keeps(features_PC, weights, biases))[0]

    return projector_mlp
