"""Implementation `compiled` of layer_norm: torch.compile of the reference."""

from fastllava_kernels._device.compiled import compiled_implementation

from .reference import layer_norm

IMPLEMENTATION = compiled_implementation(layer_norm)
