"""Room projector_splice: project patches and write them beside the text embeddings into the packed hidden states."""

from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import projector_splice

ROOM = Room(
    name="projector_splice",
    summary="Project patches and write them beside the text embeddings into the packed hidden states",
    implementations={REFERENCE: Implementation(projector_splice)},
)
