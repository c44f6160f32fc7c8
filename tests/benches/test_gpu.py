"""`fastllava bench gpu`: every piece dry on a CPU at tiny sizes, so that on a GPU none fails for a reason a CPU could show."""

import importlib.metadata
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from fastllava import cli
from fastllava.bench import bench_module
from fastllava.config import Recompute
from fastllava.errors import UserError
from fastllava_kernels import rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import tune, tuning

pieces, states, contexts, checked, launches = (
    bench_module(f"gpu.{name}") for name in ("pieces", "state", "context", "sanitizer", "launches")
)
CPU = torch.device("cpu")
ORDER = ["ceilings", "tests", "kernels", "step", "peers", "ablate", "profile", "tuning", "sanitizer"]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")


def context(folder: Path, piece: str = "step", size: str = "tiny") -> Any:
    state = states.State(folder, piece, states.Identity("code", "here", size))
    return contexts.Context(CPU, size, folder, states.Notebook(state, CPU))


def measure(folder: Path, piece: str, *units: str) -> tuple[Any, list[dict[str, Any]]]:
    """The state, and the rows that these units gave."""
    given = context(folder, piece)
    for unit in units:
        assert unit in [part for each in pieces.PIECES[piece].units("tiny") for part in (each, *pieces.PIECES[piece].split(each))]
        with given.note.unit(unit):
            pieces.PIECES[piece].measure(given, unit)
    return given.note.state, given.note.state.rows()


def test_pieces_and_their_units() -> None:
    assert list(pieces.PIECES) == ORDER
    said = CliRunner().invoke(cli.app, ["bench", "gpu", "--help"], env={"COLUMNS": "300"}).output
    assert f"{', '.join(ORDER)}; all" in said
    for name, piece in pieces.PIECES.items():
        for size in ("7b", "tiny"):
            units = piece.units(size)
            assert units
            assert len(set(units)) == len(units), name
    kernels = pieces.PIECES["kernels"].units("7b")
    assert {unit.split()[0] for unit in kernels} == set(rooms())
    assert kernels[0].startswith("masked_linear_cross_entropy 7b-5%")
    assert kernels[-1].startswith("masked_linear_cross_entropy 7b-100%")
    assert {"attention tower", "attention 7b", "projector_splice 7b-stage2"} <= set(kernels)
    step = pieces.PIECES["step"].units("7b")
    assert step[:2] == ["pretrain", "finetune"]
    assert {f"finetune train.recompute={mode}" for mode in get_args(Recompute) if mode != "none"} <= set(step)
    assert {unit.split()[1] for unit in pieces.PIECES["ablate"].units("7b")} >= {f"kernels.{room}" for room in rooms()} | {"train.compile"}
    assert pieces.PIECES["tuning"].units("7b") == list(tuning.kernels())
    assert pieces.PIECES["kernels"].split("rope 7b") == [f"rope 7b {name}" for name in rooms()["rope"].implementations]
    assert pieces.PIECES["kernels"].split("rope 7b triton") == []


def test_ceilings(tmp_path: Path) -> None:
    state, rows = measure(tmp_path, "ceilings", "world", "product 819x4096x32000", "copy", "world warm")
    assert [row["what"] for row in rows] == ["world", "product", "copy", "world"]
    assert rows[0]["conditions"] is None
    assert (rows[1]["rows"], rows[1]["inner"], rows[1]["columns"]) == (12, 64, 500)
    assert rows[1]["tflops"] == pytest.approx(2 * 12 * 64 * 500 / rows[1]["ms_p50"] / 1e9)
    assert rows[2]["gbs"] > 0
    assert all(row["versions"]["torch"] == importlib.metadata.version("torch") for row in rows)
    assert " at 12x64x500, " in pieces.PIECES["ceilings"].words(rows)
    assert not any(event["failed"] for event in state.done().values())


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "measure", lambda *_: bench_module("ceilings").Ceilings(matmul_tflops=0.1, copy_gbs=10.0))
    state, rows = measure(tmp_path, "kernels", "masked_linear_cross_entropy tiny", "swiglu tiny reference")
    assert {(row["room"], row["shape"]) for row in rows} == {("masked_linear_cross_entropy", "tiny"), ("swiglu", "tiny")}
    assert {row["implementation"] for row in rows if row["room"] == "swiglu"} == {"reference"}
    assert "wrong" not in pieces.PIECES["kernels"].words(rows)
    assert state.done()["swiglu tiny reference"]["failed"] is False


def test_a_wrong_kernel_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = bench_module("kernels")
    wrong = {"room": "rope", "implementation": "triton", "pass": "both", "shape": "tiny", "peer": False, "void": "wrong: 1"}
    monkeypatch.setattr(kernels, "measure_shape", lambda *_: iter([wrong, wrong | {"peer": True, "implementation": "theirs"}]))
    monkeypatch.setattr(contexts, "measure", lambda *_: None)
    state, rows = measure(tmp_path, "kernels", "rope tiny")
    assert state.done()["rope tiny"]["error"] == "rope triton both: wrong: 1"
    assert pieces.PIECES["kernels"].words(rows).endswith("; wrong: rope triton")


def test_steps_peers_ablation_and_profile(tmp_path: Path) -> None:
    state, rows = measure(tmp_path, "step", "finetune train.recompute=full")
    (row,) = rows
    assert (row["stage"], row["recompute"], row["layers"], row["void"], row["code"]) == ("finetune", "full", 2, None, "code")
    assert "with 2 layers" in pieces.PIECES["step"].words(rows)
    _, rows = measure(tmp_path, "peers", "pretrain")
    assert {row["variant"]: row["void"] is None for row in rows} == {
        "original": True, "transformers": True, "transformers_liger": False, "fastllava": True,
    }  # fmt: skip
    assert "times the original's recipe; void: pretrain transformers_liger" in pieces.PIECES["peers"].words(rows)
    _, rows = measure(tmp_path, "ablate", "pretrain train.micro_batch_tokens")
    assert [(row["toggle"], row["value"], row["stage"]) for row in rows] == [("train.micro_batch_tokens", "1", "pretrain")]
    assert pieces.PIECES["ablate"].words(rows).startswith("1 values timed, 0 void")
    assert not any(event["failed"] for event in state.done().values())
    _, rows = measure(tmp_path, "profile", "pretrain")
    assert rows[0]["operation"] is None
    assert rows[0]["milliseconds"] > 0
    assert "aten::mm" in {row["operation"] for row in rows[1:]}
    assert not any("AdamW.step" in row["operation"] for row in rows[1:])
    assert 0.5 < sum(row["share"] for row in rows[1:]) <= 1.001
    assert (tmp_path / "profile_pretrain.trace.json.gz").read_bytes().startswith(b"\x1f\x8b")
    assert not (tmp_path / "profile_pretrain.trace.json").exists()


@interpreted
def test_tuning_writes_a_table_beside_the_results(tmp_path: Path) -> None:
    name, never = "masked_linear_cross_entropy.row", "masked_linear_cross_entropy.long_row"
    _, rows = measure(tmp_path, "tuning", name, never)
    assert [(row["kernel"], row["shape"]) for row in rows] == [(name, "tiny"), (never, None)]
    assert rows[0]["before"] == rows[0]["after"] == rows[0]["candidates"][0][0]
    assert rows[0]["before_ms"] == rows[0]["after_ms"] > 0
    assert rows[1]["void"].endswith("no shape of tiny in room masked_linear_cross_entropy launches it")
    table = json.loads((tmp_path / "tables" / "interpreter.json").read_text())
    assert table == {}, "a kernel that stays with its first candidate is not kept twice"
    assert not (tuning.TABLES / "interpreter.json").exists()
    assert pieces.PIECES["tuning"].words(rows) == "1 entries timed; none changed; 1 void"
    changed = rows[0] | {"after": {"num_warps": 2}, "before_ms": 2.0, "after_ms": 1.5}
    assert pieces.PIECES["tuning"].words([changed]) == f"1 entries timed; changed: {name} any: 2 to 1.5 ms"


def test_the_fastest_that_passes_the_gate_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = next(iter(tuning.kernels().values()))
    configs = kernel.candidates["sm_90"]
    refused = ["{'x': 1}: OutOfResources: shared memory"]
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "_launching", lambda *_: ("7b", lambda: None))
    monkeypatch.setattr(tune, "_times", lambda *_: ({0: 3.0, 1: 1.0, 2: 2.0}, list(refused)))
    problems = {1: ["spills (8)"]}
    resources = lambda kernel, config, arch: SimpleNamespace(problems=lambda *_: problems.get(configs.index(config), []))  # noqa: E731
    monkeypatch.setattr(tune.aot, "compile_kernel", resources)
    found = tune.measure(kernel, None, torch.device("cuda"))
    assert found.chosen == configs[2]
    assert found.refused == [*refused, f"{dict(configs[1])}: spills (8)"]
    problems |= {0: ["spills (1)"], 2: ["spills (1)"]}
    with pytest.raises(ValueError, match=r"no candidate for sm_90 passes: \{'x': 1\}"):
        tune.measure(kernel, None, torch.device("cuda"))


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, printed: str, code: int = 0) -> None:
    """A compute-sanitizer that runs nothing and prints this, then the command it was given."""
    folder.mkdir()
    path = folder / "compute-sanitizer"
    path.write_text(
        f'#!/bin/sh\ncat <<\'END\'\n{printed}\nEND\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > "{folder}/command"\nexit {code}\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


BEGIN = '========= COMPUTE-SANITIZER\nlaunched: ["rope.forward"]'
OUT_OF_BOUNDS = "========= Invalid __global__ read of size 2 bytes\n=========     at _rotate+0x90 in kernel_rotate.py:40"


@pytest.mark.parametrize(
    ("printed", "code", "errors", "void", "failure"),
    [
        (f"{BEGIN}\n========= ERROR SUMMARY: 0 errors", 0, 0, None, None),
        (f"{BEGIN}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0, None, None),
        (f"{BEGIN}\n{OUT_OF_BOUNDS}\n========= ERROR SUMMARY: 1 error", 0, 1, None, "Invalid __global__ read of size 2 bytes"),
        (
            f"{BEGIN}\n{OUT_OF_BOUNDS}\n========= RACECHECK SUMMARY: 12 hazards displayed",
            0,
            12,
            None,
            "Invalid __global__ read of size 2 bytes",
        ),
        (
            "========= Error: Device not supported. Please refer",
            1,
            None,
            "cannot run here: compute-sanitizer does not support the device",
            None,
        ),
        (
            "========= COMPUTE-SANITIZER\nModuleNotFoundError: x",
            1,
            None,
            "broke: exit code 1: ModuleNotFoundError: x",
            "broke: exit code 1",
        ),
        ("========= ERROR SUMMARY: 0 errors", 0, None, "broke: exit code 0: ========= ERROR SUMMARY: 0 errors", "broke: exit code 0"),
    ],
)
def test_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, code: int, errors: int | None, void: str | None, failure: str | None
) -> None:
    tool(tmp_path / "bin", monkeypatch, printed, code)
    state, (row,) = measure(tmp_path, "sanitizer", "memcheck rope")
    assert (row["check"], row["room"], row["errors"], row["void"]) == ("memcheck", "rope", errors, void)
    done = state.done()["memcheck rope"]
    assert done["failed"] is (failure is not None)
    assert done["error"] is failure is None or done["error"].startswith(f"memcheck rope: {failure}")
    command = (tmp_path / "bin" / "command").read_text()
    assert command.startswith("1 --tool memcheck --print-limit 20 ")
    assert command.rstrip().endswith("rope cpu fp32")


def test_sanitizer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    state, (row,) = measure(tmp_path, "sanitizer", "racecheck rope")
    assert row["void"] == "cannot run here: compute-sanitizer is not installed"
    assert state.done()["racecheck rope"]["failed"] is False
    assert pieces.PIECES["sanitizer"].words([row]) == "void: cannot run here: compute-sanitizer is not installed"


def test_sanitizer_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", monkeypatch, "")
    (tmp_path / "bin" / "compute-sanitizer").write_text("#!/bin/sh\necho '========= COMPUTE-SANITIZER'\nexec sleep 60\n")
    monkeypatch.setattr(checked, "LONGEST", 0.3)
    _, (row,) = measure(tmp_path, "sanitizer", "memcheck rope")
    assert row["void"] == "no end within 0.3 s"


@interpreted
def test_what_the_sanitizer_watches_launches_a_rooms_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    launches.exercise("projector_mlp", "cpu", "fp32")
    launched = json.loads(capsys.readouterr().out.removeprefix(launches.MARK))
    assert launched == [f"projector_mlp.{name}" for name in ("gelu_backward", "linear", "linear_gelu", "linear_gelu_only")]
    checked_rooms = {unit.split()[1] for unit in pieces.PIECES["sanitizer"].units("7b")}
    assert checked_rooms == {name for name, room in rooms().items() if "triton" in room.implementations}


def test_units_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = context(tmp_path).note
    for name, error in (("a", torch.OutOfMemoryError("20 GiB")), ("b", UserError("--x: no")), ("c", RuntimeError("bad tile\nand more"))):
        with note.unit(name):
            raise error
    with note.unit("d"):
        note.row({"x": 1}, "it is wrong")
        note.row({"x": 2}, "and again")
    with note.unit("e"):
        note.row({"x": 3, "odd": math.nan, "inside": [{"most": math.inf, "least": 0.5}]})
    assert note.state.rows()[-1] == {"x": 3, "odd": None, "inside": [{"most": None, "least": 0.5}], "code": "code"}
    done = note.state.done()
    assert [done[name]["error"] for name in "abcde"] == ["out of memory", "--x: no", "RuntimeError: bad tile", "it is wrong", None]
    assert [done[name]["broke"] for name in "abcde"] == [True, True, True, False, False]
    monkeypatch.setattr(states, "usable", lambda device: False)
    with pytest.raises(states.DeviceLost), note.unit("f"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert note.state.done()["f"]["error"].startswith("RuntimeError: CUDA error: an illegal")
