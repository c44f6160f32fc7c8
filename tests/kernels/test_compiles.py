"""Each kernel that `auto` takes on a GPU is compiled once in a run, however the packs of its micro-batches differ in length.

What is counted are the keys of Triton's cache of compiled kernels (`compile_keys.py`), which knows no interpreter: another process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllava.planner.simulate import gpu_ops
from fastllava_kernels import rooms
from fastllava_kernels._tuning import tuning

LIGERS = {"add_rms_norm": "liger_kernel.ops.fused_add_rms_norm._fused_add_rms_norm_backward_kernel"}
"""Kernels of Liger that are compiled for every number of rows a multiprocessor, by room."""


def counted(stage: str, gpus: int, micro_batches: int, arch: str, *chosen: str) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_keys.py")
    command = [sys.executable, str(script), stage, str(gpus), str(micro_batches), arch, *chosen]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def assert_once(found: dict[str, Any], micro_batches: int, adapters: bool = False) -> None:
    """Fail unless every room that has kernels launched them, each with one key; those of adapters where there are some."""
    # Of captions, which are short, many packs have the same length: 300 have 45, and those of stage finetune 262.
    assert found["rows"] >= min(micro_batches // 3, 20)
    assert {name: count for name, count in found["keys"].items() if count != 1} == {}
    launched = {name.partition(".")[0] for name in found["keys"]}
    # Two are parts of projector_splice, which runs in their place, and the weights here are not quantised.
    idle = {"projector_mlp", "splice", "nf4_linear"} | (set() if adapters else {"lora_linear"})
    assert launched == {kernel.room for kernel in tuning.kernels().values()} - idle


def test_auto_takes_our_kernels_where_there_are_some() -> None:
    chosen = gpu_ops({}).chosen
    assert {name for name, implementation in chosen.items() if implementation == "liger"} == set()
    assert {kernel.room for kernel in tuning.kernels().values()} <= {name for name in rooms() if chosen[name] == "triton"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_few_micro_batches_compile_each_kernel_once(stage: str) -> None:
    assert_once(counted(stage, 8, 6, "sm_90"), 6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_three_hundred_micro_batches_compile_each_kernel_once(stage: str, gpus: int, arch: str) -> None:
    assert_once(counted(stage, gpus, 300, arch), 300)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_with_adapters_too_each_kernel_is_compiled_once(arch: str) -> None:
    """Layers of one, two and three results, of inputs of two widths, and the last layer's few rows."""
    found = counted("finetune", 8, 300, arch, "lora.rank=128")
    assert_once(found, 300, adapters=True)
    assert {name for name in found["keys"] if name.startswith("lora_linear.")} == {
        f"lora_linear.{name}" for name in ("shrink", "input", "A")
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("room", LIGERS)
def test_a_kernel_that_is_compiled_for_numbers_of_rows_is_seen(room: str) -> None:
    found = counted("finetune", 8, 6, "sm_90", f"{room}=liger")
    assert found["keys"][LIGERS[room]] > 2
    with pytest.raises(AssertionError, match=LIGERS[room].rpartition(".")[2]):
        assert_once(found, 6)
