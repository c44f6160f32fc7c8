"""Room swiglu: silu(gate) * up."""

from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import swiglu

ROOM = Room(
    name="swiglu",
    summary="silu(gate) * up",
    implementations={REFERENCE: Implementation(swiglu)},
)
