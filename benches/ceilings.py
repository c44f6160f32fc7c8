"""`fastllava bench ceilings`: the machine as it is, and what it gives at best in matrix products and copies. Floors are made of these."""

import math
from dataclasses import dataclass

import torch

from benches.lib.results import Row, Sheet
from benches.lib.timing import Call, Times, interleaved, quantiles
from benches.lib.world import check_device, nvidia_smi, world
from fastllava_kernels.workload import Cost

PRODUCTS = {
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 11008)),
    "cpu": ((256, 256, 256), (512, 512, 512), (1024, 1024, 1024)),
}
"""Rows, inner and columns of the products; the fastest counts."""
MORE_PRODUCTS = (
    *((8192, 8192, 8192), (4096, 4096, 4096), (16384, 16384, 16384)),
    # A micro-batch of 16,384 tokens: q, k, v and o; gate and up; down; the head on every token and on a twentieth.
    *((16384, 4096, 4096), (16384, 4096, 11008), (16384, 11008, 4096), (16384, 4096, 32000), (819, 4096, 32000)),
    # The projector's two, on 16 images; and the tower's MLP.
    *((9216, 1024, 4096), (9216, 4096, 4096), (9232, 1024, 4096)),
)
"""The products that the bench times; each side is a 64th on a CPU."""
COPIED = {"cuda": 2**30, "cpu": 2**26}
"""Bytes of the tensor that is copied: far more than a cache holds."""
QUERIED = (
    *("name", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu", "power.draw"),
    *("power.limit", "power.max_limit", "ecc.mode.current", "mig.mode.current", "compute_mode", "pcie.link.gen.current"),
)


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


def timed_product(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype, seconds: float) -> Times:
    """Time one product of random matrices; `sizes` as in PRODUCTS."""
    rows, inner, columns = sizes
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    return interleaved({"product": Call(lambda _: a @ b)}, device, seconds)["product"]


def product_tflops(sizes: tuple[int, ...], times: Times) -> float:
    """10^12 FLOPs a second of the median."""
    return 2 * math.prod(sizes) / times.p50 / 1e9


def timed_copy(device: torch.device, dtype: torch.dtype, seconds: float) -> Times:
    """Time one copy of COPIED bytes."""
    source = torch.randn(COPIED[device.type] // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    return interleaved({"copy": Call(lambda _: target.copy_(source))}, device, seconds)["copy"]


def copy_gbs(times: Times, device: torch.device) -> float:
    """10^9 bytes a second of the median, read and written."""
    return 2 * COPIED[device.type] / times.p50 / 1e6


def bench(device: torch.device, sheet: Sheet, seconds: float) -> list[Row]:
    """A row of the machine's state, one for every product and one for the copy, and one of the state again, now that it is warm."""
    check_device(device)
    on_gpu = device.type == "cuda"
    name, dtype = ("bf16", torch.bfloat16) if on_gpu else ("fp32", torch.float32)

    def add(row: Row, words: str) -> None:
        sheet.add({"what": row.pop("what"), "dtype": name} | row | world(device), lambda _: words)

    add(conditions(device), "as it is")
    for product in MORE_PRODUCTS:
        sizes = product if on_gpu else tuple(max(1, size // 64) for size in product)
        shape = dict(zip(("rows", "inner", "columns"), sizes, strict=True))
        if not sheet.has(what="product", dtype=name, **shape):
            times = timed_product(sizes, device, dtype, seconds)
            tflops = product_tflops(sizes, times)
            add(
                {"what": "product", **shape, **quantiles("ms", times), "tflops": tflops},
                f"{'x'.join(map(str, sizes))}, {tflops:.4g} TFLOP/s",
            )
    if not sheet.has(what="copy", dtype=name):
        times = timed_copy(device, dtype, seconds)
        gbs = copy_gbs(times, device)
        add({"what": "copy", "bytes": COPIED[device.type], **quantiles("ms", times), "gbs": gbs}, f"{gbs:.4g} GB/s")
    add(conditions(device), "warm")
    return sheet.rows


def conditions(device: torch.device) -> Row:
    """What nvidia-smi says of the GPU now; None where it cannot be asked."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {"what": "world", "conditions": nvidia_smi(device, *QUERIED), "memory_bytes": memory}
