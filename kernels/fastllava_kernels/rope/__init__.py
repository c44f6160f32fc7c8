"""Room rope: rotary position embedding of queries and keys."""

from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import rope

ROOM = Room(
    name="rope",
    summary="Rotary position embedding of queries and keys",
    implementations={REFERENCE: Implementation(rope)},
)
