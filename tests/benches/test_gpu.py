"""`fastllava bench gpu`: its commands, and each dry on a CPU at tiny sizes, so that on a GPU none fails for a reason a CPU could show."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from benches import ceilings, cli, gpu, kernels, sanitizer
from benches.lib import results
from fastllava.config import Recompute
from fastllava_kernels import rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import tuning

CPU = torch.device("cpu")
ORDER = ["ceilings", "tests", "kernels", "step", "peers", "ablate", "profile", "tuning", "sanitizer"]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")


def commands(piece: str, size: str, device: str = "cuda") -> list[gpu.Command]:
    return list(gpu.PIECES[piece](gpu.Request([], Path("out"), device, size)))


def measure(folder: Path, *words: str, code: int = 0) -> list[dict[str, Any]]:
    """The rows that a command leaves, as `bench gpu` starts it on a CPU."""
    out = folder / "rows.jsonl"
    done = CliRunner().invoke(cli.app, [*words, "--device", "cpu", "--resume", "--out", str(out)])
    assert done.exit_code == code, done.output
    return results.read(out)


def test_pieces_and_their_commands() -> None:
    assert list(gpu.PIECES) == ORDER
    said = CliRunner().invoke(cli.app, ["gpu", "--help"], env={"COLUMNS": "300"}).output
    assert f"{', '.join(ORDER)}; all" in said
    for piece in ORDER:
        for size in ("7b", "tiny"):
            found = [str(command) for command in commands(piece, size)]
            assert found
            assert len(set(found)) == len(found), piece
    whole, *later = commands("kernels", "7b")
    assert whole.words[1:4] == gpu.FIRST_ROOMS
    assert set(whole.words[1 : 1 + len(rooms())]) == set(rooms())
    shapes = set(whole.words[whole.words.index("--sizes") + 1].split(","))
    assert {"tower", "7b", "7b-5%", "7b-stage2"} <= shapes
    assert not shapes & {"7b-1%", "7b-100%", "13b", "tiny"}
    assert "7b-100%" in str(later)
    (rope,) = [part for part in whole.parts if part.words[1] == "rope"]
    assert {part.words[part.words.index("--implementations") + 1] for part in rope.parts} == set(rooms()["rope"].implementations)
    step = [str(command) for command in commands("step", "7b")]
    assert [f"--stages {stage} " in line for stage, line in zip(("pretrain", "finetune"), step, strict=False)] == [True, True]
    assert all("train." not in line for line in step[:2])
    assert all("--seconds 20" in line and "--fit" in line for line in step)
    for mode in set(get_args(Recompute)) - {"none"}:
        assert any(f"train.recompute={mode} " in line and "finetune" in line for line in step)
    assert "--stages finetune" in str(commands("peers", "7b")[0])
    toggles = commands("ablate", "7b")[0].words[-1].split(",")
    assert set(toggles) >= {f"kernels.{room}" for room in rooms()} | {"train.compile"}
    assert [part.words[1] for part in commands("tuning", "7b")[0].parts] == list(tuning.kernels())
    assert all("--seconds 0" in str(command) for command in commands("step", "tiny", "cpu"))


@pytest.mark.parametrize("piece", ORDER)
def test_the_commands_are_those_of_the_command_line(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option that is given is there: without one it would fail on the GPU only."""
    known = {command.name or command.callback.__name__: command for command in cli.app.registered_commands if command.callback}
    help_of = {}
    for command in commands(piece, "7b"):
        for each in (command, *command.parts):
            name = each.words[0]
            assert name in known
            help_of.setdefault(name, CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "300"}).output)
            for word in (*each.words, "--device", "--out", "--resume"):
                assert not word.startswith("--") or word in help_of[name]


def test_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MORE_PRODUCTS", ((819, 4096, 32000),))
    rows = measure(tmp_path, "ceilings", "--seconds", "0")
    assert [row["what"] for row in rows] == ["world", "product", "copy", "world"]
    assert rows[0]["conditions"] is None
    assert (rows[1]["rows"], rows[1]["inner"], rows[1]["columns"]) == (12, 64, 500)
    assert rows[1]["tflops"] == pytest.approx(2 * 12 * 64 * 500 / rows[1]["ms_p50"] / 1e9)
    assert rows[2]["gbs"] > 0
    assert all(row["versions"]["torch"] == importlib.metadata.version("torch") for row in rows)
    # What is there is not measured again; the machine's state is always of now.
    assert [row["what"] for row in measure(tmp_path, "ceilings", "--seconds", "0")[4:]] == ["world", "world"]


def test_kernels_leave_out_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure", lambda *_: ceilings.Ceilings(matmul_tflops=0.1, copy_gbs=10.0))
    words = ["--sizes", "tiny", "--seconds", "0", "--implementations", "reference"]
    rows = measure(tmp_path, "kernels", "swiglu", *words)
    assert {(row["room"], row["shape"], row["implementation"]) for row in rows} == {("swiglu", "tiny", "reference")}
    assert all(row["code"] for row in rows)
    again = measure(tmp_path, "kernels", "swiglu", "rope", *words)
    assert again[: len(rows)] == rows
    assert {row["room"] for row in again[len(rows) :]} == {"rope"}
    other = [row | {"code": "other"} for row in again]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    assert len(measure(tmp_path, "kernels", "swiglu", *words)) == len(other) + len(rows)


def test_a_wrong_kernel_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"room": "rope", "implementation": "triton", "pass": "both", "shape": "tiny", "peer": False, "void": "wrong: 1"}
    monkeypatch.setattr(kernels, "measure_shape", lambda *_: iter([wrong | {"peer": True, "implementation": "theirs"}, wrong]))
    monkeypatch.setattr(kernels, "measure", lambda *_: ceilings.Ceilings(1.0, 1.0))
    done = CliRunner().invoke(cli.app, ["kernels", "rope", "--sizes", "tiny", "--device", "cpu"])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "rope tiny triton both: wrong: 1"


def test_peers_and_steps_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    words = commands("step", "tiny", "cpu")[2].words
    (row,) = measure(tmp_path / "step", *words)
    assert (row["stage"], row["recompute"], row["layers"], row["void"]) == ("finetune", "selective", 2, None)
    assert row["overrides"] == ["train.recompute=selective"]
    assert len(measure(tmp_path / "step", *words)) == 1
    toggles = ["--toggles", "train.micro_batch_tokens"]
    (row,) = measure(tmp_path / "ablate", *commands("ablate", "tiny", "cpu")[0].words[:-2], *toggles)
    assert (row["toggle"], row["value"], row["stage"]) == ("train.micro_batch_tokens", "1", "pretrain")


def test_profile(tmp_path: Path) -> None:
    request = gpu.Request([], tmp_path, "cpu", "tiny")
    measure(tmp_path / "steps", *next(gpu.profile(request)).words)
    rows = results.read(tmp_path / "profile.jsonl")
    assert rows[0]["operation"] is None
    assert rows[0]["milliseconds"] > 0
    assert "aten::mm" in {row["operation"] for row in rows[1:]}
    assert not any("AdamW.step" in row["operation"] for row in rows[1:])
    assert 0.5 < sum(row["share"] for row in rows[1:]) <= 1.001
    assert (tmp_path / "tiny_pretrain.trace.json.gz").read_bytes().startswith(b"\x1f\x8b")
    assert not (tmp_path / "tiny_pretrain.trace.json").exists()


@interpreted
def test_tuning_writes_a_table_beside_the_results(tmp_path: Path) -> None:
    name, never = "masked_linear_cross_entropy.row", "masked_linear_cross_entropy.long_row"
    rows = measure(tmp_path, "tuning", name, never, "--size", "tiny", "--tables", str(tmp_path / "tables"))
    assert [(row["kernel"], row["shape"]) for row in rows] == [(name, "tiny"), (never, None)]
    assert rows[0]["before"] == rows[0]["after"] == rows[0]["candidates"][0][0]
    assert rows[0]["before_ms"] == rows[0]["after_ms"] > 0
    assert rows[1]["void"].endswith("no shape of tiny in room masked_linear_cross_entropy launches it")
    table = json.loads((tmp_path / "tables" / "interpreter.json").read_text())
    assert table == {}, "a kernel that stays with its first candidate is not kept twice"
    assert not (tuning.TABLES / "interpreter.json").exists()
    assert len(measure(tmp_path, "tuning", name, "--size", "tiny", "--tables", str(tmp_path / "tables"))) == 2


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
    monkeypatch.setattr(sanitizer, "CHECKS", ("memcheck",))
    done = CliRunner().invoke(cli.app, ["sanitizer", "rope", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
    (row,) = results.read(tmp_path / "rows.jsonl")
    assert (row["check"], row["room"], row["errors"], row["void"]) == ("memcheck", "rope", errors, void)
    assert done.exit_code == (0 if failure is None else 1)
    assert failure is None or done.output.splitlines()[-1].startswith(f"memcheck rope: {failure}")
    command = (tmp_path / "bin" / "command").read_text()
    assert command.startswith("1 --tool memcheck --print-limit 20 ")
    assert command.rstrip().endswith("launch rope cpu fp32")


def test_sanitizer_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = measure(tmp_path, "sanitizer", "rope")
    assert {(row["check"], row["void"]) for row in rows} == {
        (check, "cannot run here: compute-sanitizer is not installed") for check in ("memcheck", "racecheck")
    }


def test_sanitizer_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path / "bin", monkeypatch, "")
    (tmp_path / "bin" / "compute-sanitizer").write_text("#!/bin/sh\necho '========= COMPUTE-SANITIZER'\nexec sleep 60\n")
    monkeypatch.setattr(sanitizer, "LONGEST", 0.3)
    monkeypatch.setattr(sanitizer, "CHECKS", ("memcheck",))
    (row,) = measure(tmp_path, "sanitizer", "rope", code=1)
    assert row["void"] == "no end within 0.3 s"


@interpreted
def test_what_the_sanitizer_watches_launches_a_rooms_kernels() -> None:
    done = CliRunner().invoke(cli.app, ["launch", "projector_mlp", "cpu", "fp32"])
    launched = json.loads(done.output.removeprefix(sanitizer.MARK))
    assert launched == [f"projector_mlp.{name}" for name in ("gelu_backward", "linear", "linear_gelu", "linear_gelu_only")]
