"""Room rms_norm: root-mean-square norm over the last axis, computed in fp32."""

from fastllava_kernels.compiled import compiled, needs_compiler
from fastllava_kernels.contract import Contract
from fastllava_kernels.liger import needs_liger
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .op import rms_norm_liger
from .reference import check, rms_norm

ROOM = Room(
    name="rms_norm",
    summary="Root-mean-square norm over the last axis, computed in fp32",
    implementations={
        "liger": Implementation(rms_norm_liger, needs_liger),
        "compiled": Implementation(compiled(rms_norm), needs_compiler, auto_on=frozenset({"cuda"})),
        REFERENCE: Implementation(rms_norm),
    },
    contract=Contract(check),
)
