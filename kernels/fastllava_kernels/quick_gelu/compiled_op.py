"""Implementation `compiled` of quick_gelu: torch.compile of the reference."""

from fastllava_kernels._device.compiled import compiled_implementation

from .reference import quick_gelu

IMPLEMENTATION = compiled_implementation(quick_gelu)
