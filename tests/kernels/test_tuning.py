"""The tables of configurations, and the gate that compiles them ahead of time."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from fastllava_kernels import rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import aot, tune, tuning
from fastllava_kernels._tuning.aot import Resources

RUNNING = aot.triton_minor()


def kernels_of(package: Path) -> set[str]:
    """Every function decorated with triton.jit that no other calls as a function: what is launched."""
    decorated, called = set(), set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                decorated.add(node.name)
                inner = [call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]
                called |= set(inner)
    return decorated - called


def test_every_kernel_that_is_launched_is_described(repo: Path) -> None:
    launched = kernels_of(repo / "kernels" / "fastllava_kernels")
    assert "_loss_row" in launched
    assert launched == {kernel.function.fn.__name__ for kernel in tuning.kernels().values()}


@pytest.mark.parametrize("arch", ["interpreter", *aot.ARCHITECTURES])
def test_every_kernel_has_a_configuration_and_no_table_repeats_a_first_candidate(arch: str) -> None:
    found = list(tuning.configurations(arch))
    assert {kernel for kernel, *_ in found} == set(tuning.kernels())
    for kernel, _, _, config in found:
        assert config in tuning.kernels()[kernel].candidates[arch], "an entry that the code does not offer"
    for name in tuning.read_table(arch):
        first = tuning.kernels()[name].candidates[arch][0]
        assert any(kernel == name and config != first for kernel, _, _, config in found), "a kernel that the table need not have"


@pytest.mark.parametrize("kernel", tuning.kernels().values(), ids=tuning.kernels())
def test_a_kernel_names_its_room_and_a_size_of_its_workload(kernel: tuning.Kernel) -> None:
    assert kernel.rows in rooms()[kernel.room].workload.shapes[tune.SIZE]


OP = tuning.Kernel("op.forward", None, {}, {}, {"interpreter": [{"B": 77}]}, "rows")
TABLE = {"op.forward": {"3.6": {"1024": {"B": 1}, "4096": {"B": 2}, "any": {"B": 3}}, "3.8": {"any": {"B": 4}}}}


@pytest.mark.parametrize(
    ("version", "rows", "wanted"),
    [("3.6.0", 1, 1), ("3.6.0", 1024, 1), ("3.6.2", 1025, 2), ("3.7.1", 4097, 3), ("3.8.0", 5, 4), ("3.10.0", 5, 4), ("3.5.0", 5, 1)],
)
def test_which_entry_is_taken(monkeypatch: pytest.MonkeyPatch, version: str, rows: int, wanted: int) -> None:
    monkeypatch.setattr(tuning, "read_table", lambda arch: TABLE)
    monkeypatch.setattr(tuning, "_buckets", tuning._buckets.__wrapped__)
    monkeypatch.setattr(triton, "__version__", version)
    assert tuning.config(OP, rows, torch.device("cpu"))["B"] == wanted


def test_without_any_the_largest_bucket_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "read_table", lambda arch: {"op.forward": {"3.6": {"16": {"B": 1}, "128": {"B": 2}}}})
    monkeypatch.setattr(tuning, "_buckets", tuning._buckets.__wrapped__)
    assert tuning.config(OP, 1000, torch.device("cpu"))["B"] == 2


@pytest.mark.parametrize("table", [{}, {"other.forward": {"3.6": {"any": {"B": 1}}}}])
def test_a_kernel_that_the_table_leaves_out_runs_with_its_first_candidate(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, object]
) -> None:
    monkeypatch.setattr(tuning, "read_table", lambda arch: table)
    monkeypatch.setattr(tuning, "_buckets", tuning._buckets.__wrapped__)
    assert tuning.config(OP, 1000, torch.device("cpu")) == {"B": 77, **tuning.FUSION}


def test_a_table_with_a_kernel_that_the_code_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "read_table", lambda arch: {"rope.gone": {}})
    with pytest.raises(ValueError, match=r"tables/sm_90.json has rope.gone, which the code has not: run the tuner"):
        list(tuning.configurations("sm_90"))


def test_an_override_ends_with_its_block() -> None:
    name, kernel = next(iter(tuning.kernels().items()))
    before = tuning.config(kernel, 1, torch.device("cpu"))
    with tuning.override(name, {"num_warps": 77}):
        assert tuning.config(kernel, 1, torch.device("cpu"))["num_warps"] == 77
    assert tuning.config(kernel, 1, torch.device("cpu")) == before


def test_a_written_table_keeps_what_other_versions_say_and_nothing_that_the_code_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, kernel), (other, _) = list(tuning.kernels().items())[:2]
    first = dict(kernel.candidates["sm_90"][0])
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    (tmp_path / "sm_90.json").write_text(json.dumps({name: {"1.0": {"any": {"num_warps": 2}}}, "gone": {}}))
    tune.write("sm_90", {name: {"any": first}, other: {"any": tuning.kernels()[other].candidates["sm_90"][0]}})
    table = json.loads((tmp_path / "sm_90.json").read_text())
    assert table == {name: {"1.0": {"any": {"num_warps": 2}}, RUNNING: {"any": first}}}
    (tmp_path / "sm_90.json").write_text("{}")
    tune.write("sm_90", {name: {"any": first}})
    assert json.loads((tmp_path / "sm_90.json").read_text()) == {}


FITS = Resources(registers=128, shared=1000, spilled=0, tensor_core=4, async_copy=4)


@pytest.mark.parametrize(
    ("change", "arch", "warps", "problem"),
    [
        ({}, "sm_80", 8, None),
        ({"spilled": 8}, "sm_90", 8, "spills"),
        ({"shared": 164 * 1024}, "sm_80", 8, "shared memory"),
        ({"shared": 164 * 1024}, "sm_90", 8, None),
        ({"shared": 228 * 1024}, "sm_90", 8, "shared memory"),
        ({"registers": 168}, "sm_90", 16, "registers"),
        ({"tensor_core": 0}, "sm_90", 8, "tensor-core"),
        ({"async_copy": 0}, "sm_80", 8, "asynchronous copy"),
    ],
)
def test_what_the_gate_refuses(change: dict[str, int], arch: str, warps: int, problem: str | None) -> None:
    found = Resources(**{**FITS.__dict__, **change}).problems(arch, warps, matmul=True)
    assert [problem in words for words in found] == ([True] if problem else [])


def without_interpreter(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_the_gate_sees_spills_in_machine_code() -> None:
    """A row of 32,768 logits in four warps does not fit 255 registers a thread; in 16 it does."""
    code = """
from fastllava_kernels._tuning import aot, tuning
kernel = tuning.kernels()["masked_linear_cross_entropy.row"]
for warps in (4, 16):
    found = aot.compile_kernel(kernel, {"num_warps": warps, "num_stages": 1}, "sm_90")
    print(found.spilled, found.registers, found.problems("sm_90", warps, False))
"""
    ran = without_interpreter(code)
    assert ran.returncode == 0, ran.stderr
    spilling, fitting = ran.stdout.splitlines()
    assert int(spilling.split()[0]) > 0
    assert "spills" in spilling
    assert fitting.startswith("0 ")
    assert fitting.endswith("[]")


def test_a_description_that_lost_a_parameter_is_refused() -> None:
    code = """
import dataclasses
from fastllava_kernels._tuning import aot, tuning
kernel = tuning.kernels()["masked_linear_cross_entropy.row"]
aot.compile_kernel(dataclasses.replace(kernel, constants={}), {"num_warps": 16, "num_stages": 1}, "sm_90")
"""
    assert "BLOCK_V, ONE_BLOCK, WANTS_GRADIENT is in its parameters or in its description, not in both" in without_interpreter(code).stderr


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter has nothing to compile")
def test_the_interpreter_has_nothing_to_compile() -> None:
    with pytest.raises(RuntimeError, match="unset it"):
        aot.compile_kernel(next(iter(tuning.kernels().values())), {"num_warps": 1}, "sm_90")


def test_the_committed_table_holds_every_entry(repo: Path) -> None:
    """`make check` compiles them and compares the numbers; this only sees that none was left out."""
    committed = (repo / "kernels" / "aot.md").read_text(encoding="utf-8")
    lines = [line for line in committed.splitlines() if line.startswith("| ") and " sm_" in line]
    assert len(lines) == len(aot.entries())
    for entry in aot.entries():
        assert any(line.startswith(f"| {entry.kernel} | {entry.arch} | {entry.tuned} | {entry.bucket} |") for line in lines)


def test_another_triton_is_held_to_the_limits_only() -> None:
    now = "By `...`, Triton 9.9, bf16; nothing"
    assert aot._differences("By `...`, Triton 0.1, bf16; nothing\nold", now) == []
    assert aot._differences(f"Triton {RUNNING}, bf16\nold", f"Triton {RUNNING}, bf16\nnew") == ["- old", "+ new"]
