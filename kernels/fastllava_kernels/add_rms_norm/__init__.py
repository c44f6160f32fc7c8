"""Room add_rms_norm: residual addition and the norm after it in one pass."""

from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import add_rms_norm

ROOM = Room(
    name="add_rms_norm",
    summary="Residual addition and the root-mean-square norm after it",
    implementations={REFERENCE: Implementation(add_rms_norm)},
)
