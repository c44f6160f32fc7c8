"""The decoder's linear layers with products in fp8, by torchao's recipes (`train.fp8`). Imported only where a run wants them.

Each operand is scaled by its largest value as it comes and rounded to e4m3, in `tensorwise` the incoming gradient to e5m2:

    tensorwise           one scale a tensor; all three products of a layer in fp8
    rowwise              one scale a row or column, a power of 2; all three in fp8
    rowwise_with_gw_hp   the same, but the weight's gradient in the compute dtype

torchao's own module keeps its input, and forms the gradient of its weight, where the weight is frozen too. This one does neither,
so stage pretrain takes two products a layer, as in bf16. The weight is cast anew for each product. A frozen one's values could be
kept in fp8, in the two orders that products read: 2 bytes a weight, as much as bf16 takes.

On a CPU the products are emulated: what is rounded to fp8 is multiplied in fp32.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torchao.float8.config import CastConfig, Float8LinearConfig, ScalingType
from torchao.float8.float8_scaling_utils import get_maybe_axiswise_dim, hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig, ScaledMMConfig

from fastllava.model.products import linear


class Fp8Linear:
    """`x @ weight.T + bias` in fp8, of x [T, D] in the compute dtype; weight [F, D] and bias [F] in any dtype. [T, F] in x's dtype."""

    def __init__(self, recipe: str) -> None:
        plain = Float8LinearConfig.from_recipe_name(recipe)
        products = plain.gemm_config_output, plain.gemm_config_grad_input, plain.gemm_config_grad_weight
        # Rows of a packed batch come in any number, and products in fp8 add up multiples of 16.
        self._config = dataclasses.replace(plain, pad_inner_dim=True)
        self._real, self._emulated = (
            LinearMMConfig(*(ScaledMMConfig(emulate, each.use_fast_accum, False, True) for each in products)) for emulate in (False, True)
        )

    def __call__(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        if not x_TD.shape[0]:
            # No row, no largest value.
            return linear(x_TD, weight_FD, bias_F)
        out_TF = _Product.apply(x_TD, weight_FD, self._config, self._real if x_TD.is_cuda else self._emulated)
        return out_TF if bias_F is None else out_TF + bias_F.to(x_TD.dtype)


@torch._dynamo.allow_in_graph
class _Product(torch.autograd.Function):
    """`x @ weight.T`; keeps x only where the weight's gradient needs it."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor, config: Float8LinearConfig, products: LinearMMConfig) -> Tensor:
        ctx.config, ctx.products = config, products
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[1] else None, weight_FD)
        x = _cast(x_TD, config.cast_config_input, -1, GemmInputRole.INPUT, config, products)
        return x @ _cast(weight_FD.t(), config.cast_config_weight, 0, GemmInputRole.WEIGHT, config, products)

    @staticmethod
    def backward(ctx: Any, d_out_TF: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TD, weight_FD = ctx.saved_tensors
        config, products, d_x, d_weight = ctx.config, ctx.products, None, None
        if ctx.needs_input_grad[0]:
            d_out = _cast(d_out_TF, config.cast_config_grad_output, -1, GemmInputRole.GRAD_OUTPUT, config, products)
            weight = _cast(weight_FD.t(), config.cast_config_weight_for_grad_input, -1, GemmInputRole.WEIGHT, config, products)
            d_x = d_out @ weight.t()
        if ctx.needs_input_grad[1]:
            d_out = _cast(d_out_TF, config.cast_config_grad_output_for_grad_weight, 0, GemmInputRole.GRAD_OUTPUT, config, products)
            x = _cast(x_TD, config.cast_config_input_for_grad_weight, 0, GemmInputRole.INPUT, config, products)
            d_weight = (d_out.t() @ x).to(weight_FD.dtype)
        return d_x, d_weight, None, None


def _cast(x: Tensor, how: CastConfig, along: int, role: GemmInputRole, config: Float8LinearConfig, products: LinearMMConfig) -> Tensor:
    """`x` as an operand in fp8; as it is where the recipe leaves this product in the compute dtype. `along`: what has one scale."""
    if how.scaling_type is ScalingType.DISABLED:
        return x
    return hp_tensor_to_float8_dynamic(
        x,
        how.target_dtype,  # pyright: ignore[reportArgumentType] (set by the config)
        products,
        gemm_input_role=role,
        scaling_granularity=how.scaling_granularity,
        axiswise_dim=get_maybe_axiswise_dim(along, how.scaling_granularity),
        round_scales_to_power_of_2=config.round_scales_to_power_of_2,
    )
