"""What the commands for a GPU are made of: the run of tests, the layers that fit, the profile, and the way into the tables."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benches import ceilings, cli, gpu, tests
from benches import report as reporting
from benches.lib import fit, ours, profile, request, results, unattended
from benches.lib.request import Request
from benches.lib.unattended import LOST_GPU
from benches.lib.world import REPO, code_of
from fastllava.errors import UserError
from fastllava.model.execution import Execution
from fastllava.planner.sizes import SIZES

CPU = torch.device("cpu")


MADE = """
from pathlib import Path

import pytest


def test_a_passes():
    (Path(__file__).parent / "ran").write_text("a")


def test_b_fails():
    assert 1 + 1 == 3, "the sum is off"


def test_c_was_recorded():
    (Path(__file__).parent / "ran").write_text("c")


@pytest.mark.skip(reason="no need")
def test_d_is_skipped():
    pass
"""


def test_tests_go_on_where_they_were_stopped_and_all_failures_are_collected(tmp_path: Path) -> None:
    """With a real process, through the command."""
    made, out = tmp_path / "test_made.py", tmp_path / "out"
    made.write_text(MADE)
    code = code_of(tests.TESTED)
    for name, its_code in (("c_was_recorded", code), ("a_passes", "other code")):
        # pytest names tests of files outside the checkout without their file.
        row = {"test": f"::test_{name}", "outcome": "passed", "seconds": 1.0, "error": None, "code": its_code}
        results.append(out / "tests.jsonl", row)
    chosen = f"tests/test_house.py::test_ci_is_executable,{made}"
    done = CliRunner().invoke(cli.app, ["gpu", "tests", "--device", "cpu", "--tests", chosen, "--out", str(out)])
    assert done.exit_code == 1, done.output
    rows = results.read(out / "tests.jsonl")[2:]
    outcomes = {row["test"].rpartition("::")[2]: row["outcome"] for row in rows if row["test"]}
    assert outcomes.pop("test_ci_is_executable") == "passed"
    assert outcomes == {"test_a_passes": "passed", "test_b_fails": "failed", "test_d_is_skipped": "skipped"}
    assert (tmp_path / "ran").read_text() == "a"
    assert rows[-1]["outcome"] == "totals"
    assert (rows[-1]["passed"], rows[-1]["failed"], rows[-1]["skipped"]) == (3, 1, 1)
    assert rows[-1]["versions"]["torch"] == importlib.metadata.version("torch")
    (failure,) = [row["error"] for row in rows if row["outcome"] == "failed"]
    assert failure.startswith("AssertionError: the sum is off")
    assert "tests: failed in" in done.output
    assert "1 failed, 1 skipped; first failure ::test_b_fails" in done.output


def test_paths_that_are_not_there_are_the_users_mistake() -> None:
    done = CliRunner().invoke(cli.app, ["tests", "tests/nowhere", "--device", "cpu"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("bench tests: tests/nowhere is not there")


def report(test: str, when: str, outcome: str, longrepr: str = "") -> Any:
    """As pytest gives it to plugins."""
    kinds = {kind: outcome == kind for kind in ("passed", "failed", "skipped")}
    return SimpleNamespace(nodeid=test, when=when, outcome=outcome, duration=0.25, longrepr=longrepr, **kinds)


def test_a_test_has_one_row_whatever_its_phases_give(tmp_path: Path) -> None:
    sheet = results.Sheet(tmp_path / "rows.jsonl", resume=True)
    sheet.known.append({"test": "known", "outcome": "passed"})
    recorder = tests.Recorder(sheet)
    for each in (
        *(report("fine", when, "passed") for when in ("setup", "call", "teardown")),
        *(report("torn", when, outcome, "E   late") for when, outcome in (("setup", "passed"), ("call", "passed"), ("teardown", "failed"))),
        # Its worker ended after the failure was told, so pytest-xdist tells of the test once more.
        *(
            report("lost", when, "failed", words)
            for when, words in (("call", "x\nE   illegal access\nE   more"), ("???", "worker crashed"))
        ),
        *(report("known", when, "passed") for when in ("setup", "call", "teardown")),
    ):
        recorder.pytest_runtest_logreport(each)
    recorder.pytest_collectreport(report("tests/broken.py", "collect", "failed", "ImportError: no x"))
    rows = sheet.rows
    assert [(row["test"], row["outcome"], row["error"]) for row in rows] == [
        ("fine", "passed", None),
        ("torn", "failed", "late"),
        ("lost", "failed", "illegal access\nmore"),
        ("tests/broken.py", "error", "ImportError: no x"),
    ]
    assert rows[0]["seconds"] == 0.75
    assert tests.in_words(rows) == "1 passed, 2 failed, 1 error; first failure torn"


def test_several_processes_test_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert "-n" not in tests.options(tmp_path, on_gpu=False)
    on_gpu = tests.options(tmp_path, on_gpu=True)
    assert on_gpu[on_gpu.index("-n") + 1] == "8"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "-n" not in tests.options(tmp_path, on_gpu=True)


def test_a_test_that_breaks_the_gpu_ends_its_process(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("conftest_looked_at", repo / "tests" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    conftest.pytest_runtest_logfinish("a")

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    conftest.pytest_runtest_logfinish("a")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.exit.Exception, match="a left the GPU unusable: CUDA error: an illegal") as ended:
        conftest.pytest_runtest_logfinish("a")
    assert ended.value.returncode == conftest.GPU_GONE == LOST_GPU
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(pytest.exit.Exception):
        conftest.pytest_runtest_logfinish("a")
    assert codes == [conftest.GPU_GONE]


GIB = 2**30


def test_layers_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    need = {3: 10 * GIB, 32: 68 * GIB}
    assert [fit.fitting(need, usable * GIB, 32) for usable in (80, 68, 67.9, 20, 10, 6, 1)] == [32, 32, 31, 8, 3, 1, 1]
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=(20 / 0.95 + 1.5) * GIB))
    monkeypatch.setattr(fit, "bytes_of", lambda depth, extra: need[depth] + extra(1, 2))

    def layers(device: torch.device, *extra: Any) -> int:
        return fit.layers_that_fit(lambda depth: depth, 32, device, *extra)  # pyright: ignore[reportArgumentType]

    assert layers(cuda) == 8
    assert layers(cuda, lambda trained, frozen: (trained + frozen) * GIB) == 6
    assert layers(CPU) == 32

    def fails(*_: Any) -> float:
        raise NotImplementedError("no fake")

    monkeypatch.setattr(fit, "bytes_of", fails)
    assert layers(cuda) == 32


def test_bytes_are_those_of_the_planner() -> None:
    run = Request(CPU, ["tiny"], ["finetune"], 4, 0.0).run("tiny", "finetune", 2)
    model = ours.build(SIZES["tiny"].origin, Execution(fit.reference_ops(), torch.float32), CPU)
    weights = sum(each.numel() for each in model.llm.parameters())
    # Weights, gradients and two moments, in fp32.
    found = fit.bytes_of(run, lambda trained, frozen: 1e9 * (trained > frozen > 0)) - 1e9
    assert found > 16 * weights
    size = fit.MicroBatch.largest(run.plan, range(run.n_steps))
    steps_looked_at = [run.step(index) for index in range(run.n_steps)]
    micro_batches = [step.samples[at] for step in steps_looked_at for ranks in step.micro_batches for at in ranks]
    assert size.rows == max(int(run.samples.n_tokens[chosen].sum()) for chosen in micro_batches)
    assert size.samples == max(map(len, micro_batches))


def test_a_step_without_memory_is_tried_with_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "layers_that_fit", lambda *_: 32)
    asked = Request(CPU, ["7b"], ["finetune"], 4, 0.0, fit=True)
    assert list(asked.depths("7b", "finetune"))[:5] == [32, 24, 18, 13, 9]
    assert list(asked.depths("7b", "finetune"))[-1] == 1
    assert next(Request(CPU, ["7b"], ["finetune"], 4, 0.0, 8, fit=True).depths("7b", "finetune")) == 8
    assert list(Request(CPU, ["7b"], ["finetune"], 4, 0.0, 8).depths("7b", "finetune")) == [8]
    out_of_memory = iter([True, True, False])

    def weigh(*_: Any) -> Any:
        if next(out_of_memory, False):
            raise torch.OutOfMemoryError("20 GiB")
        return 1.0, 1.0, 1

    monkeypatch.setattr("benches.lib.trials.weigh", weigh)
    monkeypatch.setattr(request, "layers_that_fit", lambda *_: 2)
    done = CliRunner().invoke(cli.app, ["step", "--sizes", "tiny", "--stages", "pretrain", "--fit", "--device", "cpu", "--seconds", "0"])
    assert done.exit_code == 0, done.output
    assert done.output.count("void, out of memory") == 2


def event(key: str, device: str, start: float, stop: float, annotation: bool = False) -> Any:
    """As the profiler gives it, in microseconds; both a single event and a sum of such."""
    return SimpleNamespace(
        key=key, count=2, device_type=SimpleNamespace(name=device), is_user_annotation=annotation, self_device_time_total=stop - start,
        self_cpu_time_total=1.0, time_range=SimpleNamespace(start=start, end=stop),
    )  # fmt: skip


def test_only_kernels_count_on_a_gpu() -> None:
    found = [
        event("gemm", "CUDA", 0, 300_000),
        event("norm", "CUDA", 250_000, 400_000),
        event("Optimizer.step#AdamW.step", "CUDA", 0, 1_000_000, annotation=True),
        event("aten::mm", "CPU", 0, 900_000),
    ]
    assert profile._busy(found, 1.0) == pytest.approx(0.4)
    rows = profile.operations(found, on_gpu=True)
    assert [(row["operation"], row["calls"], row["ms"]) for row in rows] == [("gemm", 2, 300.0), ("norm", 2, 150.0)]
    assert [row["share"] for row in rows] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]


def test_results_in_a_folder_reach_the_tables(tmp_path: Path) -> None:
    """Rows as `bench gpu` writes them, of a stage that has a time and of one that has none."""
    (source,) = results.RESULTS.glob("peers*.jsonl")
    lines = [json.loads(line) | {"code": "0123456789ab"} for line in source.read_text().splitlines()]
    for line in lines:
        results.append(tmp_path / "h200" / "peers.jsonl", line)
        # Without a time there is nothing to draw.
        results.append(tmp_path / "none" / "peers.jsonl", line | {"void": "no"})
    text = reporting.PEERS.table(tmp_path)
    assert "`benches/results/h200/peers.jsonl`" in text
    assert text.count("\n| ") > 3
    assert reporting.charts_of_results(tmp_path / "charts", tmp_path) == [
        tmp_path / "charts" / "h200" / "peers" / "peers_150m_finetune.png"
    ]
    assert (tmp_path / "charts" / "h200" / "peers" / "peers_150m_finetune.png").read_bytes().startswith(b"\x89PNG")


def test_processes_do_not_find_the_checkout_on_the_import_path() -> None:
    assert unattended.environment("cuda")["TRITON_INTERPRET"] == "0"
    printed = "import runpy, sys; runpy.run_path(sys.argv[1]); import benches; print(sys.path, benches.__path__)"
    command = [sys.executable, "-c", printed, unattended.program([])[-1]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
    places, path = done.stdout.strip().split("] ")
    assert not {f"'{REPO}'", f"'{REPO / 'benches'}'", "''"} & set(places.strip("[").split(", "))
    assert path == str([str(REPO / "benches")])


def test_what_nvidia_smi_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 1980 MHz'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0-1", total_memory=150 * GIB))
    said = ceilings.conditions(torch.device("cuda"))
    assert said["conditions"] == {"name": "NVIDIA H200", "memory.total": "143771 MiB", "clocks.sm": "1980 MHz"}
    assert said["memory_bytes"] == 150 * GIB
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert ceilings.conditions(torch.device("cuda"))["conditions"] is None


def test_the_gpu_is_named_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that waits must take nothing of it."""
    asked = gpu.Request(["tests", "step"], tmp_path, "cuda", "7b")
    printed = "a warning\\n" + json.dumps({"device": "NVIDIA H200"})
    monkeypatch.setattr(gpu, "program", lambda words: [sys.executable, "-c", f"print('{printed}')"])
    assert gpu.device_of(asked) == "NVIDIA H200"
    monkeypatch.setattr(gpu, "program", lambda words: [sys.executable, "-c", "import sys; sys.exit('no driver')"])
    with pytest.raises(UserError, match="no driver"):
        gpu.device_of(asked)


def test_code_is_what_the_files_say(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    first = code_of(["a/*.py"], tmp_path)
    assert code_of(["a/*.py", "a/x.*"], tmp_path) == first
    (tmp_path / "a" / "y.txt").write_text("1")
    assert code_of(["a/*.py"], tmp_path) == first
    (tmp_path / "a" / "x.py").write_text("2")
    assert code_of(["a/*.py"], tmp_path) != first
