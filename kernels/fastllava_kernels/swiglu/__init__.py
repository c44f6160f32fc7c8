"""Room swiglu: silu(gate) * up."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "swiglu",
    "silu(gate) * up",
    ("triton", "liger", "compiled", REFERENCE),
)
