"""Implementation `compiled` of rope: torch.compile of the reference."""

from fastllava_kernels._device.compiled import compiled_implementation

from .reference import rope

IMPLEMENTATION = compiled_implementation(rope)
