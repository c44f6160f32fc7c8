"""Room rope: rotary position embedding of queries and keys."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "rope",
    "Rotary position embedding of queries and keys",
    ("triton", "liger", "compiled", REFERENCE),
)
