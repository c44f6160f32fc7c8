"""The linear layers of a decoder's blocks: what builds one as the run wants it, and what several make of one input."""

from dataclasses import dataclass, replace

from torch import Tensor

from fastllava.config import TARGETS, LoraConfig, Quantize
from fastllava.model.layers import Linear, multiply
from fastllava.model.lora import LoraLinear, adapted, number_of
from fastllava.model.ops import Ops
from fastllava.model.products import Product, linear
from fastllava.model.quantised import Nf4Linear, quantised_weight


@dataclass(frozen=True)
class Linears:
    """How the linear layers of one decoder layer are built."""

    ops: Ops | None = None
    """The ops of the run; only layers with adapters or quantised weights need them."""
    product: Product = linear
    """What computes those without adapters."""
    lora: LoraConfig | None = None
    """Their adapters; None for none."""
    quantize: Quantize | None = None
    """How their weights are kept; None for as they are."""
    layer: int = 0

    def of_layer(self, layer: int) -> "Linears":
        """The same for decoder layer number `layer`."""
        return replace(self, layer=layer)

    def build(self, name: str, inputs: int, outputs: int, bias: bool) -> Linear:
        """The layer of this name, one of `TARGETS`, on the current default device."""
        if self.ops is None:
            return Linear(inputs, outputs, bias, self.product)
        weight = None if self.quantize is None else quantised_weight(name, inputs, outputs, self.quantize)
        if self.lora is not None and name in self.lora.targets:
            return LoraLinear(inputs, outputs, bias, self.lora, self.ops, number_of(self.layer, TARGETS.index(name)), weight)
        if weight is not None:
            return Nf4Linear(inputs, outputs, bias, weight, self.ops)
        return Linear(inputs, outputs, bias, self.product)


PLAIN = Linears()
"""Layers without adapters."""


def project(x: Tensor, row_keys: Tensor | None, *layers: Linear) -> tuple[Tensor, ...]:
    """What each of `layers` makes of the same x [..., in]. In backward their parts of its gradient are added up in the products.

    row_keys: int64 [rows] that the dropout of adapters is drawn by, or None.
    """
    with_adapters = [layer for layer in layers if isinstance(layer, LoraLinear)]
    if not with_adapters:
        return multiply(x, *layers)
    if len(with_adapters) == len(layers):
        return adapted(x, with_adapters, row_keys)
    others = [layer for layer in layers if not isinstance(layer, LoraLinear)]
    results = dict(zip([*with_adapters, *others], [*adapted(x, with_adapters, row_keys), *multiply(x, *others)], strict=True))
    return tuple(results[layer] for layer in layers)
