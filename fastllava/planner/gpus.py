"""The GPUs a run can be planned for: what their data sheets say, and what was measured of such a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastllava.config.problems import did_you_mean
from fastllava.errors import UserError
from fastllava.train.metrics.flops import PEAK_FLOPS

PRODUCT_SHARE = 0.79
"""The share of the dense bf16 peak that large products reach: 769 to 798 of 989 TFLOP/s at 8192^3 on an H200. Assumed of the others."""
COPY_SHARE = 0.90
"""The share of the memory's bandwidth that a copy reaches: 4.3 of 4.8 TB/s on an H200. Assumed of the others."""
STEP_SHARE = 0.9
"""What a step is assumed to reach of the sum of its parts, each at its own ceiling: gaps, small products, waiting. Not measured yet."""
NETWORK = 50e9
"""Between nodes, bytes a second of each GPU each way: 400 Gb/s, as nodes of eight such GPUs are sold with."""
NODE = 8
"""GPUs of a node."""
RESERVED = 1.5 * 2**30
"""Bytes that CUDA, its libraries and their workspaces take, about."""
USABLE = 0.95
"""The share of the rest that tensors can fill before the allocator runs out of space in one piece."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    peak: float
    """Dense bf16 operations a second."""
    memory: float
    """Bytes."""
    bandwidth: float
    """The bandwidth of its memory, bytes a second."""
    generation: int
    """The first number of its compute capability."""
    link: float
    """To the other GPUs of a node, bytes a second each way."""

    @property
    def usable(self) -> float:
        """Bytes for the tensors of a run."""
        return USABLE * (self.memory - RESERVED)


# Peaks as MFU counts them, with fp32 sums; the rest from NVIDIA's data sheets: memory as the driver shows it, links by NVLink. The H100
# PCIe has PCIe 5.0, those below it PCIe 4.0. Of both cards of 48 GB, whose memory corrects errors, PyTorch shows 44.4 GiB.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", PEAK_FLOPS["A100"], 39.4 * 2**30, 1.555e12, 8, 300e9),
        Gpu("a100-80g", PEAK_FLOPS["A100"], 79.2 * 2**30, 2.039e12, 8, 300e9),
        Gpu("h100-80g", PEAK_FLOPS["H100"], 79.1 * 2**30, 3.35e12, 9, 450e9),
        Gpu("h200", PEAK_FLOPS["H200"], 139.8 * 2**30, 4.8e12, 9, 450e9),
        Gpu("h100-pcie", PEAK_FLOPS["H100 PCIe"], 79.1 * 2**30, 2.0e12, 9, 64e9),
        Gpu("l40s-48g", PEAK_FLOPS["L40S"], 44.4 * 2**30, 0.864e12, 8, 32e9),
        Gpu("rtx6000ada-48g", PEAK_FLOPS["RTX 6000 Ada"], 44.4 * 2**30, 0.96e12, 8, 32e9),
        Gpu("rtx4090-24g", PEAK_FLOPS["RTX 4090"], 23.6 * 2**30, 1.008e12, 8, 32e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises UserError for one that is not listed."""
    if name not in GPUS:
        raise UserError(f"--gpu: '{name}' is not listed{did_you_mean(name, list(GPUS))}; write one of {', '.join(GPUS)}")
    return GPUS[name]
