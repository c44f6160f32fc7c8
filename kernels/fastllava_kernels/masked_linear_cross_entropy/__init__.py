"""Room masked_linear_cross_entropy: weighted sum of the next-token cross-entropy over supervised rows only."""

from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import masked_linear_cross_entropy

ROOM = Room(
    name="masked_linear_cross_entropy",
    summary="Weighted sum of the next-token cross-entropy over supervised rows only",
    implementations={REFERENCE: Implementation(masked_linear_cross_entropy)},
)
