"""Room splice: projected patches beside the text embeddings into the packed hidden states."""

from fastllava_kernels.contract import Contract
from fastllava_kernels.launch import needs_gpu
from fastllava_kernels.room import REFERENCE, Implementation, Room

from . import op
from .reference import check, splice

ROOM = Room(
    name="splice",
    summary="Write projected patches beside the text embeddings into the packed hidden states",
    implementations={
        "triton": Implementation(op.triton, needs_gpu, interpretable=True),
        "torch": Implementation(op.eager),
        REFERENCE: Implementation(splice),
    },
    contract=Contract(check, one_dtype=False),
)
