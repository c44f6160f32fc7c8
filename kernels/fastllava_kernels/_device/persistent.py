"""How kernels that work row by row share the rows: a fixed number P of programs, each with every P-th block of rows.

The number of rows is an argument that Triton specialises nothing on, so packs of any length run the same machine code. The number of
programs is the table's, not the device's: sums over a program's rows, and of those over the programs, have one order, whatever GPU of
the architecture runs them. While a program computes with a block of rows, the next ones are on their way into shared memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastllava_kernels._device.launch import cdiv, power_of_2
from fastllava_kernels._tuning import tuning

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
"""How many an A100 has, and an H100 SXM or H200."""

BYTES_AHEAD = 16 * 1024
"""A block of rows that is larger is not loaded ahead: several of them in several stages would not fit shared memory."""


WHOLE = 4096
"""Elements that 16 warps take at a time, 8 of them, 16 bytes of bf16, a thread."""

FEWEST_WARPS = 4
"""A multiprocessor holds 32 blocks at most, which of fewer warps would be too few."""


def share(kernel: tuning.Kernel, rows: int, width: int, x: Tensor, **constants: Any) -> tuple[dict[str, Any], tuple[int]]:
    """Return the constants of a launch over `rows` rows of `width` columns, at least one row, and its grid.

    Where a block would be a few rows, one row is a block of fewer warps: a thread has as much to do, and keeps less.
    """
    config = tuning.config(kernel, rows, x.device)
    block_d = power_of_2(width)
    parts = max(1, config["BLOCK"] // block_d)
    if config["num_warps"] // parts >= FEWEST_WARPS:
        config |= {"BLOCK": config["BLOCK"] // parts, "num_warps": config["num_warps"] // parts, "PROGRAMS": config["PROGRAMS"] * parts}
    if max(block_d, config["BLOCK"]) * x.element_size() > BYTES_AHEAD:
        config["STAGES"] = 1
    blocks = cdiv(rows, cdiv(config["BLOCK"], block_d))
    return config | {"WIDTH": width, "BLOCK_D": block_d} | constants, (min(blocks, config["PROGRAMS"]),)


def described(
    name: str, function: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], width: int, resident: int
) -> tuning.Kernel:
    """Describe a kernel whose other arguments are `rows` and `eps`, for rows of `width` columns.

    resident: blocks of 16 warps that a multiprocessor holds, by the registers that aot.md lists.
    """
    return tuning.Kernel(
        name=name,
        function=function,
        signature={**pointers, "rows": "i32", "eps": "fp32"},
        constants={**constants, "WIDTH": width, "BLOCK_D": power_of_2(width)},
        candidates={arch: _candidates(resident * count, max(1, WHOLE // power_of_2(width))) for arch, count in MULTIPROCESSORS.items()}
        | {"interpreter": [_config(1024, 3, 1, 1)]},
        rows="rows",
        unaligned={"WIDTH": width - 3},
    )


def _candidates(programs: int, parts: int) -> Sequence[tuning.Config]:
    whole = ((WHOLE, programs, 3, 16), (WHOLE, programs, 1, 16), (WHOLE, programs, 2, 8), (WHOLE // 2, 2 * programs, 3, 8))
    return [_config(elements // parts, count * parts, stages, max(1, warps // parts)) for elements, count, stages, warps in whole]


def _config(elements: int, programs: int, stages: int, warps: int) -> tuning.Config:
    """Return a configuration: elements of a block of rows, programs, stages of the loop over blocks, warps."""
    return {"BLOCK": elements, "PROGRAMS": programs, "STAGES": stages, "num_warps": warps, "num_stages": 1}
