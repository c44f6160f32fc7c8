"""What this device gives at best, measured in the same process: matrix products and copies. Floors are made of these."""

import math
from dataclasses import dataclass

import torch

from benches.timing import Call, Times, interleaved
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
    return Ceilings(measure_matmul(device, dtype, seconds), copy_gbs(timed_copy(device, dtype, seconds), device))


def measure_matmul(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """10^12 FLOPs a second of the fastest product, `seconds` for each."""
    return max(product_tflops(sizes, timed_product(sizes, device, dtype, seconds)) for sizes in PRODUCTS[device.type])


def timed_product(sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seconds: float) -> Times:
    """Of one product of random matrices; `sizes` as in PRODUCTS."""
    rows, inner, columns = sizes
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    return interleaved({"product": Call(lambda _: a @ b)}, device, seconds)["product"]


def product_tflops(sizes: tuple[int, int, int], times: Times) -> float:
    """10^12 FLOPs a second of the median."""
    return 2 * math.prod(sizes) / times.p50 / 1e9


def timed_copy(device: torch.device, dtype: torch.dtype, seconds: float) -> Times:
    """Of one copy of COPIED bytes."""
    source = torch.randn(COPIED[device.type] // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    return interleaved({"copy": Call(lambda _: target.copy_(source))}, device, seconds)["copy"]


def copy_gbs(times: Times, device: torch.device) -> float:
    """10^9 bytes a second of the median, read and written."""
    return 2 * COPIED[device.type] / times.p50 / 1e6
