"""Room layer_norm: layer norm over the last axis."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "layer_norm",
    "Layer norm over the last axis",
    ("triton", "liger", "compiled", REFERENCE),
)
