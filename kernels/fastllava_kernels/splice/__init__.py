"""Room splice: projected patches beside the text embeddings into the packed hidden states."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "splice",
    "Write projected patches beside the text embeddings into the packed hidden states",
    ("triton", "torch", REFERENCE),
)
