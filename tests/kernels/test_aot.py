"""The gate that compiles every kernel ahead of time: what it reads in machine code, what it refuses, and what it calls worse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import aot, aot_table, machine_code, tuning
from fastllava_kernels._tuning.aot_table import Row
from fastllava_kernels._tuning.machine_code import Resources

RUNNING = aot.triton_minor()
FITS = Resources(registers=128, shared=1000, spilled=0, loads={128: 8}, stores={128: 4}, products={"HGMMA.64x128x16": 4}, async_copy=4)


@pytest.mark.parametrize(
    ("change", "arch", "warps", "problem"),
    [
        ({}, "sm_90", 8, None),
        ({"spilled": 8}, "sm_90", 8, "spills"),
        ({"shared": 164 * 1024, "products": {"HMMA.16816": 64}}, "sm_80", 8, "shared memory"),
        ({"shared": 164 * 1024}, "sm_90", 8, None),
        ({"shared": 228 * 1024}, "sm_90", 8, "shared memory"),
        ({"registers": 168}, "sm_90", 16, "registers"),
        ({"products": {}}, "sm_90", 8, "no tensor-core instruction HGMMA"),
        ({"products": {"HMMA.16816": 64}}, "sm_90", 8, "no tensor-core instruction HGMMA"),
        ({"products": {"HMMA.16816": 64}}, "sm_80", 8, None),
        ({"async_copy": 0}, "sm_90", 8, "asynchronous copy"),
    ],
)
def test_what_the_gate_refuses(change: dict[str, object], arch: str, warps: int, problem: str | None) -> None:
    found = Resources(**{**FITS.__dict__, **change}).problems(arch, warps, matmul=True)
    assert [problem in words for words in found] == ([True] if problem else [])


def test_sizes_that_16_does_not_divide_are_held_to_less() -> None:
    odd = Resources(**{**FITS.__dict__, "spilled": 8, "async_copy": 0})
    assert odd.problems("sm_90", 8, matmul=True, aligned=False) == []


@pytest.mark.parametrize(
    ("registers", "shared", "arch", "warps", "resident"),
    [
        (32, 0, "sm_80", 8, 64),  # the most that there are
        (33, 0, "sm_80", 8, 48),  # registers are given in portions: 40 for 33
        (72, 0, "sm_90", 4, 28),
        (255, 0, "sm_90", 8, 8),
        (255, 0, "sm_90", 16, 0),  # not one block
        (32, 65536, "sm_80", 8, 16),  # shared memory: two blocks of 65 KB in 164
        (32, 98304, "sm_90", 8, 16),
        (16, 0, "sm_80", 1, 32),  # blocks: 32 at most
    ],
)
def test_warps_that_a_multiprocessor_holds(registers: int, shared: int, arch: str, warps: int, resident: int) -> None:
    found = Resources(registers, shared, 0, {}, {}, {}, 0)
    assert found.warps_resident(arch, warps) == resident


SAID = """
 Function k:
  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:400
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 LDG.E.U16.CONSTANT R4, [R2.64] ;
        /*0030*/              @!PT LDG.E.128 R4, [R2.64] ;
        /*0040*/             @!UP0 LDG.E R4, [R2.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ;
        /*0060*/               @P1 STG.E.64 [R2.64], R4 ;
        /*0070*/                   UTMASTG.2D [UR4], [UR6] ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0090*/                   LDL R1, [R2] ;
        /*00a0*/                   LDS.128 R4, [R2] ;
"""


def test_what_is_read_in_machine_code() -> None:
    found = machine_code.parse(SAID, 77)
    assert (found.registers, found.shared, found.spilled, found.async_copy) == (40, 77, 9, 1)
    assert found.loads == {128: 2, 16: 1, 32: 1}, "what stands behind @!PT never runs, and shared memory is another"
    assert found.stores == {64: 1, machine_code.TMA: 1}
    assert found.products == {"HGMMA.64x128x16": 1}
    with pytest.raises(RuntimeError, match="no code that could be read"):
        machine_code.parse("nothing", 0)


def line(**changed: str) -> Row:
    made = aot_table.row(("op.forward", "sm_90", "first candidate", "any", aot_table.ALIGNED, "BLOCK=1"), FITS, 32)
    return {**made, **changed}


@pytest.mark.parametrize(
    ("before", "now", "worse"),
    [
        ({}, {}, None),
        ({}, {"loads": "8x32"}, "loads most of its bytes in 32 bits, 128 before"),
        ({}, {"stores": "4x128 32x16"}, None),
        ({}, {"stores": "1x128 32x16"}, "stores most of its bytes in 16 bits, 128 before"),
        ({"loads": "8x32"}, {"loads": "8x128"}, None),
        ({"loads": "4xTMA"}, {"loads": "99x128"}, "loads most of its bytes in 128 bits"),
        ({}, {"warps": "24"}, "24 warps on a multiprocessor, 32 before"),
        ({}, {"warps": "48"}, None),
        ({}, {"spills": "8"}, "spills (8), 0 before"),
        ({}, {"tensor core": "64 HMMA.16816"}, "no tensor-core instruction HGMMA any more"),
        ({}, {"tensor core": "8 HGMMA.64x64x16"}, None),
        ({"kernel": "other.forward"}, {"loads": "8x32"}, None),
        ({"sizes": aot_table.ANY_SIZE}, {"loads": "8x32"}, None),
        ({"configuration": "BLOCK=2"}, {"warps": "24"}, "24 warps"),
    ],
)
def test_what_is_worse_than_the_table(before: dict[str, str], now: dict[str, str], worse: str | None) -> None:
    committed = aot_table.parse("\n".join(aot_table.render([line(**before)])))
    assert committed == [line(**before)], "what is written is read again"
    found = aot_table.worse(committed, [line(**now)])
    assert [str(worse) in words for words in found] == ([True] if worse else [])


def without_interpreter(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment)


MUTATED = """
import dataclasses, importlib.util, sys
from fastllava_kernels._tuning import aot, tuning

def of_file(path, name):
    spec = importlib.util.spec_from_file_location("mutated", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.KERNELS[name]

folder, table = sys.argv[1:]
committed = open(table, encoding="utf-8").read()
wide = {"BLOCK": 8192, "num_warps": 4, "num_stages": 1}
low = {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "SPLITS": 1, "num_warps": 4, "num_stages": 3}
for name, kernel, config in (
    ("swiglu.forward", of_file(folder + "/holed.py", "swiglu.forward"), None),
    ("swiglu.forward", None, wide),
    ("projector_splice.linear_place", None, low),
    ("swiglu.forward", None, None),
):
    kernel = kernel or tuning.kernels()[name]
    config = config or kernel.candidates["sm_90"][0]
    entry = aot.Entry(name, "sm_90", tuning.FIRST, tuning.ANY, tuple(config.items()))
    judged = [(entry, aot.compile_kernel(kernel, config, "sm_90"), [])]
    print(*aot.aot_table.worse(aot.aot_table.parse(committed), aot.rows(judged)), sep="; ")
"""


def test_the_gate_sees_a_kernel_that_became_worse(tmp_path: Path, repo: Path) -> None:
    """A mask with a hole, blocks that fill the registers, and tiles too low for HGMMA, each against the committed table; then none."""
    whole = (repo / "kernels/fastllava_kernels/swiglu/kernel_swiglu.py").read_text(encoding="utf-8")
    (tmp_path / "holed.py").write_text(whole.replace("mask=at < elements", "mask=(at < elements) & (at != 5)"), encoding="utf-8")
    ran = without_interpreter(MUTATED, str(tmp_path), str(repo / "kernels/aot.md"))
    assert ran.returncode == 0, ran.stderr
    holed, wide, low, same = ran.stdout.split("\n")[:4]
    assert "loads most of its bytes in 16 bits, 128 before" in holed
    assert "stores most of its bytes in 16 bits, 128 before" in holed
    assert "warps on a multiprocessor, 64 before" in wide
    assert "no tensor-core instruction HGMMA any more" in low
    assert same == ""


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
    committed = aot_table.parse((repo / "kernels" / "aot.md").read_text(encoding="utf-8"))
    sizes = {True: aot_table.ALIGNED, False: aot_table.ANY_SIZE}
    wanted = [(entry.kernel, entry.arch, entry.tuned, entry.bucket, sizes[entry.aligned]) for entry in aot.entries()]
    assert [(row["kernel"], row["arch"], row["tuned with"], row["rows up to"], row["sizes"]) for row in committed] == wanted


def test_another_triton_is_held_to_the_limits_only() -> None:
    entry = aot.Entry("op.forward", "sm_90", tuning.FIRST, "any", (("BLOCK", 1), ("num_warps", 8)))
    now = aot.render([(entry, FITS, [])])
    narrow = now.replace("8x128", "8x256")
    assert aot.against_table(now, [(entry, FITS, [])]) == []
    found = aot.against_table(narrow, [(entry, FITS, [])])
    assert "loads most of its bytes in 128 bits, 256 before" in found[0]
    assert found[1].startswith("the table is out of date")
    assert aot.against_table(narrow.replace(f"Triton {RUNNING}", "Triton 0.1"), [(entry, FITS, [])]) == []
