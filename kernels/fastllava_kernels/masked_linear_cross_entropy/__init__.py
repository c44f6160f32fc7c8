"""Room masked_linear_cross_entropy: weighted sum of the next-token cross-entropy over supervised rows only."""

from fastllava_kernels.contract import Contract
from fastllava_kernels.launch import needs_gpu
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .op import masked_linear_cross_entropy_torch, masked_linear_cross_entropy_triton
from .reference import check, masked_linear_cross_entropy

ROOM = Room(
    name="masked_linear_cross_entropy",
    summary="Weighted sum of the next-token cross-entropy over supervised rows only",
    implementations={
        "triton": Implementation(masked_linear_cross_entropy_triton, needs_gpu, interpretable=True),
        "torch": Implementation(masked_linear_cross_entropy_torch),
        REFERENCE: Implementation(masked_linear_cross_entropy),
    },
    contract=Contract(check, no_gradient=("weights_M",), one_dtype=False),
)
