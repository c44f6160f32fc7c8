"""Room projector_splice: project patches and write them beside the text embeddings into the packed hidden states."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "projector_splice",
    "Project patches and write them beside the text embeddings into the packed hidden states",
    ("triton", "torch", REFERENCE),
    parts=("projector_mlp", "splice"),
)
