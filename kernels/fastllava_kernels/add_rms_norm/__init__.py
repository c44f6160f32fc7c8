"""Room add_rms_norm: residual addition and the norm after it in one pass."""

from fastllava_kernels.compiled import compiled, needs_compiler
from fastllava_kernels.contract import Contract
from fastllava_kernels.liger import needs_liger
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .op import add_rms_norm_liger
from .reference import add_rms_norm, check

ROOM = Room(
    name="add_rms_norm",
    summary="Residual addition and the root-mean-square norm after it",
    implementations={
        "liger": Implementation(add_rms_norm_liger, needs_liger),
        "compiled": Implementation(compiled(add_rms_norm), needs_compiler, auto_on=frozenset({"cuda"})),
        REFERENCE: Implementation(add_rms_norm),
    },
    contract=Contract(check),
)
