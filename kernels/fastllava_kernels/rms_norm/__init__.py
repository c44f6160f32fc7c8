"""Room rms_norm: root-mean-square norm over the last axis, computed in fp32."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "rms_norm",
    "Root-mean-square norm over the last axis, computed in fp32",
    ("triton", "liger", "compiled", REFERENCE),
)
