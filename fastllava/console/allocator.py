"""How PyTorch hands out a GPU's memory, which it reads from the environment when it starts; imports nothing."""

import os
from collections.abc import MutableMapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The variable, and the names that it had before PyTorch 2.9, which are still read."""
GROWING = "expandable_segments:True"
"""A block of memory grows as it is needed: nearly every packed micro-batch has other sizes, and blocks of fixed sizes leave gaps."""


def let_memory_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Ask for memory that grows, unless the user has asked for something; to be called before torch is imported."""
    if not any(name in environment for name in VARIABLES):
        environment[VARIABLES[0]] = GROWING


def allocator_in_words(environment: MutableMapping[str, str] = os.environ) -> str:
    """What the environment asks PyTorch for."""
    return ", ".join(f"{name}={environment[name]}" for name in VARIABLES if name in environment) or "PyTorch's own setting"
