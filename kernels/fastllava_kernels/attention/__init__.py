"""Room attention: attention of packed samples, each row seeing its own sample only."""

from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import attention

ROOM = Room(
    name="attention",
    summary="Attention of packed samples, each row seeing its own sample only",
    implementations={REFERENCE: Implementation(attention)},
)
