"""Room layer_norm: layer norm over the last axis."""

from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import layer_norm

ROOM = Room(
    name="layer_norm",
    summary="Layer norm over the last axis",
    implementations={REFERENCE: Implementation(layer_norm)},
)
