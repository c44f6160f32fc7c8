"""Room add_rms_norm: residual addition and the norm after it in one pass."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "add_rms_norm",
    "Residual addition and the root-mean-square norm after it",
    ("triton", "liger", "compiled", REFERENCE),
)
