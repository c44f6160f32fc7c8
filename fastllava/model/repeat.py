"""How a model calls each of its layers; torch.compile and recomputation take the place of the plain call."""

from typing import Any

from torch import nn


def apply(layer: nn.Module, *args: Any) -> Any:
    """`layer(*args)`."""
    return layer(*args)
