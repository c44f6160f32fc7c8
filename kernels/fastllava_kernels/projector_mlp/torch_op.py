"""Implementation `torch` of projector_mlp: PyTorch's Linear and GELU, on any device, that keep only what goes into each GELU."""

from fastllava_kernels._device import plain
from fastllava_kernels.room import Implementation

from .autograd import define

IMPLEMENTATION = Implementation(define("torch", lambda tensor: plain))
