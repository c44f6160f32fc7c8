"""Room rms_norm: root-mean-square norm over the last axis, computed in fp32."""

from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import rms_norm

ROOM = Room(
    name="rms_norm",
    summary="Root-mean-square norm over the last axis, computed in fp32",
    implementations={REFERENCE: Implementation(rms_norm)},
)
