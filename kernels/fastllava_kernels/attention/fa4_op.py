"""Implementation `fa4` of attention: PyTorch's varlen_attn by FlashAttention 4, to which a process-wide switch turns it."""

from fastllava_kernels.room import Implementation

from .availability import needs_flash_4, needs_width_of_flash_4, unordered_flash_4
from .flash import define
from .varlen_op import Varlen

IMPLEMENTATION = Implementation(define("fa4", Varlen("FA4")), needs_flash_4, needs_width_of_flash_4, unordered_flash_4)
