"""What this device gives at best, measured in the same process: matrix products and copies. Floors are made of these."""

from dataclasses import dataclass

import torch

from benches.timing import Call, interleaved
from fastllava_kernels.workload import Cost

PRODUCTS = {
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 11008)),
    "cpu": ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024)),
}
"""Rows, inner and columns of the products; the fastest counts."""

COPIED = {"cuda": 2**30, "cpu": 2**26}
"""Bytes of the tensor that is copied: far more than a cache holds."""


@dataclass(frozen=True)
class Ceilings:
    """The most that was measured."""

    matmul_tflops: float
    """10^12 FLOPs a second, a multiply-add being two."""
    copy_gbs: float
    """10^9 bytes a second, read and written."""

    def floor_ms(self, cost: Cost) -> float:
        """The least milliseconds for this work: products at the matmul ceiling or bytes at the copy ceiling, the longer."""
        return max(cost.flops / self.matmul_tflops / 1e9, cost.bytes / self.copy_gbs / 1e6)


def measure(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """`seconds` for each size. Random numbers: a GPU multiplies zeros faster, because they take less power."""
    tflops = measure_matmul(device, dtype, seconds)
    source = torch.randn(COPIED[device.type] // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    copy = interleaved({"copy": Call(lambda _: target.copy_(source))}, device, seconds)["copy"]
    return Ceilings(tflops, 2 * source.nbytes / copy.p50 / 1e6)


def measure_matmul(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """10^12 FLOPs a second of the fastest product, `seconds` for each."""
    return max(_product(sizes, device, dtype, seconds) for sizes in PRODUCTS[device.type])


def _product(sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    rows, inner, columns = sizes
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    times = interleaved({"product": Call(lambda _: a @ b)}, device, seconds)["product"]
    return 2 * rows * inner * columns / times.p50 / 1e9
