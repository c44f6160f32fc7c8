"""`fastllava bench host`: the host's time for an op, by the way it is made."""

from typing import Any

import torch

from benches import host
from benches.lib.results import Sheet
from fastllava_kernels._tuning import tuning


def test_a_row_for_each_way_and_each_op_of_a_layer() -> None:
    said = []
    rows: list[dict[str, Any]] = host.bench(Sheet(say=said.append), rounds=3)
    ways, layer = rows[:3], rows[3:]
    assert [row["variant"] for row in ways] == ["torch.library.custom_op", "fastllava_kernels.op", "autograd function"]
    assert [row["room"] for row in layer] == list(host.ROOMS)
    assert all(row[part] > 0 for row in rows for part in ("forward", "backward", "evaluation"))
    assert ways[0]["forward_share"] == 1
    assert ways[1]["forward_share"] == ways[1]["forward"] / ways[0]["forward"]
    assert len(said) == len(rows)
    assert "us (1.00)" in said[0]


def test_nothing_stays_changed() -> None:
    with host._without_launching():
        pass
    assert all("run" not in vars(kernel.function) for kernel in tuning.kernels().values())
    from fastllava_kernels._device.launch import takes
    from fastllava_kernels.rms_norm import triton_op

    assert triton_op.takes is takes
    assert torch.ops.fastllava.rms_norm_triton is not None
