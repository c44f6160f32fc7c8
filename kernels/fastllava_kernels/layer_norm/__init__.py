"""Room layer_norm: layer norm over the last axis."""

from fastllava_kernels.compiled import compiled, needs_compiler
from fastllava_kernels.contract import Contract
from fastllava_kernels.liger import needs_liger
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .op import layer_norm_liger
from .reference import check, layer_norm

ROOM = Room(
    name="layer_norm",
    summary="Layer norm over the last axis",
    implementations={
        "liger": Implementation(layer_norm_liger, needs_liger),
        "compiled": Implementation(compiled(layer_norm), needs_compiler, auto_on=frozenset({"cuda"})),
        REFERENCE: Implementation(layer_norm),
    },
    contract=Contract(check),
)
