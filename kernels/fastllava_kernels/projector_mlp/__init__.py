"""Room projector_mlp: the projector alone, for people who place its rows themselves."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "projector_mlp",
    "Linear layers with an exact GELU between two, from the tower's features to the decoder's width",
    ("triton", "torch", REFERENCE),
)
