"""Implementation `torch` of nf4_linear: plain PyTorch on any device, a block of the weight at a time."""

from fastllava_kernels._device.nf4 import plain_part
from fastllava_kernels.room import Implementation

from .autograd import define

IMPLEMENTATION = Implementation(define("torch", lambda tensor: plain_part))
