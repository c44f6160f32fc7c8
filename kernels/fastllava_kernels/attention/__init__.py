"""Room attention: attention of packed samples, each row seeing its own sample only.

`auto` takes FlashAttention by PyTorch where it runs and takes the model's heads; else the reference, or `sdpa` in a graph of
torch.compile. The others are taken by name.
"""

from fastllava_kernels.contract import Contract
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .availability import (
    needs_flash,
    needs_flash_3,
    needs_flash_4,
    needs_flex,
    needs_width_of_flash,
    needs_width_of_flex,
    needs_xformers,
)
from .block_mask import flex
from .flash import fa3, fa4, varlen
from .memory_efficient import xformers
from .per_sample import sdpa
from .reference import attention, check

ROOM = Room(
    name="attention",
    summary="Attention of packed samples, each row seeing its own sample only",
    implementations={
        "varlen": Implementation(varlen, needs_flash, needs_width_of_flash),
        "fa3": Implementation(fa3, needs_flash_3, needs_width_of_flash),
        "fa4": Implementation(fa4, needs_flash_4, needs_width_of_flash),
        "xformers": Implementation(xformers, needs_xformers, needs_width_of_flash),
        REFERENCE: Implementation(attention, untraceable="it reads the samples' lengths on the host"),
        "sdpa": Implementation(sdpa),
        "flex": Implementation(flex, needs_flex, needs_width_of_flex),
    },
    contract=Contract(check),
)
