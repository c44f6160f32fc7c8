"""Room nf4_linear: a frozen linear layer whose weight is kept in four bits."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "nf4_linear",
    "x @ weight.T + bias of a frozen weight that is kept in NF4, four bits each",
    ("triton", "torch", REFERENCE),
)
