"""Room masked_linear_cross_entropy: weighted sum of the next-token cross-entropy over supervised rows only."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "masked_linear_cross_entropy",
    "Weighted sum of the next-token cross-entropy over supervised rows only",
    ("triton", "torch", REFERENCE),
)
