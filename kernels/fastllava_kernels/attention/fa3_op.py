"""Implementation `fa3` of attention: PyTorch's varlen_attn by FlashAttention 3, to which a process-wide switch turns it."""

from fastllava_kernels.room import Implementation

from .availability import needs_flash_3, needs_width_of_flash
from .flash import define
from .varlen_op import Varlen

IMPLEMENTATION = Implementation(define("fa3", Varlen("FA3")), needs_flash_3, needs_width_of_flash)
