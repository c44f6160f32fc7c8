"""The runner of `fastllava bench gpu`: what is stopped goes on, what breaks stops nothing else, nothing is lost.

Its processes are stand-ins that write what a real one writes; test_gpu.py has real ones.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastllava import cli
from fastllava.bench import bench_module
from fastllava.errors import UserError

gpu, contexts, child = (bench_module(f"gpu.{name}") for name in ("runner", "context", "child"))
CPU = torch.device("cpu")
UNITS = ["one", "two", "three"]
STAND_IN = """
import json, os, signal, sys, time
order = json.loads(sys.argv[-1])
me = {"piece": order["piece"], **order["identity"]}
rows = os.path.join(order["folder"], order["piece"] + ".jsonl")
def write(path, line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\\n")
def note(event, unit, **facts):
    write(os.path.join(order["folder"], "state.jsonl"), {**me, "event": event, "unit": unit, "at": 0, **facts})
def count():
    return len(open(rows).readlines()) if os.path.exists(rows) else 0
for unit in order["units"]:
    print("began", unit, flush=True)
    note("begun", unit, rows=count())
    act = open(os.path.join(order["folder"], unit)).read() if os.path.exists(os.path.join(order["folder"], unit)) else ""
    failed = {"failed": False, "broke": False, "error": None}
    exec(act)
    write(rows, {"unit": unit, "code": order["identity"]["code"]})
    note("done", unit, seconds=0.1, **failed)
"""
"""A file with the name of a unit holds what the process does in it."""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """For results; the pieces are `first` and `second`, of three units each."""

    def words(rows: list[dict[str, Any]]) -> str:
        return f"{len(rows)} rows"

    def split(unit: str) -> list[str]:
        return [f"{unit}.a", f"{unit}.b"] if "." not in unit else []

    plain = contexts.Piece("a piece", lambda size: list(UNITS), lambda context, unit: None, words)
    monkeypatch.setattr(gpu, "PIECES", {"first": plain, "second": dataclasses.replace(plain, split=split)})
    monkeypatch.setattr(child.Order, "command", lambda self: [sys.executable, "-c", STAND_IN, json.dumps(dataclasses.asdict(self))])
    monkeypatch.setattr(gpu, "code_of", lambda patterns: "code")
    return tmp_path


def bench(folder: Path, *names: str, **changes: Any) -> dict[str, Any]:
    """Outcomes by piece, and under "said" what was said."""
    said: list[str] = []
    request = gpu.Request(names, folder, CPU, "tiny", **changes)
    return {outcome.piece: outcome for outcome in gpu.bench(request, said.append)} | {"said": said}


def rows(folder: Path, piece: str = "first") -> list[str]:
    return [json.loads(line)["unit"] for line in (folder / f"{piece}.jsonl").read_text().splitlines()]


def state(folder: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (folder / "state.jsonl").read_text().splitlines()) if line["event"] == event]


def test_what_is_complete_is_skipped_until_it_is_asked_for_again(folder: Path) -> None:
    found = bench(folder)
    assert (found["first"].status, found["second"].status) == ("done", "done")
    assert found["first"].words == "3 rows"
    assert rows(folder) == UNITS
    (ended, _) = state(folder, "ended")
    assert (ended["exit"], ended["complete"], ended["failed"]) == (0, True, False)
    assert {"commit", "code", "device", "size", "seconds"} <= set(ended)
    assert (folder / "first.log").read_text() == "began one\nbegan two\nbegan three\n"
    found = bench(folder, "first")
    assert found["said"][0] == "first: complete with this code, device and size, so skipped; --again measures anew"
    assert rows(folder) == UNITS
    found = bench(folder, "first", again=True)
    assert rows(folder) == UNITS * 2
    assert found["first"].words == "3 rows"


@pytest.mark.parametrize("change", ["code", "size"])
def test_other_code_or_size_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    bench(folder, "first")
    if change == "code":
        monkeypatch.setattr(gpu, "code_of", lambda patterns: "other")
    gpu.bench(gpu.Request(["first"], folder, CPU, "tiny" if change == "code" else "7b"), lambda line: None)
    assert rows(folder) == UNITS * 2


def test_stopped_at_its_limit_a_piece_keeps_its_rows_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "two").write_text("write(rows, {'unit': 'half of two', 'code': order['identity']['code']}); time.sleep(60)")
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    found = bench(folder, "first")
    assert found["first"].status == "goes on"
    assert found["first"].words == "2 rows; 2 units left"
    assert not gpu.failed([found["first"]])
    assert rows(folder) == ["one", "half of two"]
    assert [line["exit"] for line in state(folder, "ended")] == [None]
    # However often: a unit that has rows to show for its time is not given up.
    assert bench(folder, "first")["first"].status == "goes on"
    (folder / "two").unlink()
    monkeypatch.setattr(gpu, "LIMIT", 30.0)
    assert bench(folder, "first")["first"].status == "done"
    assert rows(folder) == ["one", "half of two", "half of two", "two", "three"]


def test_a_unit_that_never_ends_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "one").write_text("time.sleep(60)")
    monkeypatch.setattr(gpu, "LIMIT", 0.5)
    assert bench(folder, "first")["first"].status == "goes on"
    found = bench(folder, "first")["first"]
    assert found.status == "failed"
    assert found.words.startswith("one: no end within 0.0 min (")
    monkeypatch.setattr(gpu, "LIMIT", 30.0)
    assert bench(folder, "first")["first"].status == "failed"
    assert rows(folder) == ["two", "three"]


def test_a_process_that_dies_takes_its_unit_with_it_and_no_other(folder: Path) -> None:
    (folder / "two").write_text("os.kill(os.getpid(), signal.SIGSEGV)")
    found = bench(folder)
    assert found["first"].status == "failed"
    assert found["first"].words == "two: the process ended with signal SIGSEGV (2 rows)"
    assert gpu.failed([found["first"]])
    assert rows(folder) == ["one", "three"]
    # A unit that can be cut is: its parts are tried one by one.
    assert rows(folder, "second") == ["one", "two.a", "two.b", "three"]


def test_after_a_lost_gpu_another_process_goes_on(folder: Path) -> None:
    (folder / "two").write_text(f"note('done', unit, seconds=1, failed=True, broke=True, error='illegal access'); sys.exit({child.LOST})")
    found = bench(folder, "first")["first"]
    assert rows(folder) == ["one", "three"]
    assert found.words == "two: illegal access (2 rows)"
    assert state(folder, "ended")[0]["exit"] == 0


def test_a_process_that_cannot_begin_ends_the_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child.Order, "command", lambda self: [sys.executable, "-c", "import sys; sys.exit(3)"])
    found = bench(folder)
    assert found["first"].words.startswith("the process ended with exit code 3 (")
    assert found["second"].status == "failed"


def test_a_wrong_result_is_a_failure_and_the_unit_is_done(folder: Path) -> None:
    (folder / "one").write_text("failed = {'failed': True, 'broke': False, 'error': 'swiglu triton: wrong\\nby far'}")
    found = bench(folder, "second")["second"]
    assert (found.status, found.words) == ("failed", "one: swiglu triton: wrong (3 rows)")
    assert rows(folder, "second") == UNITS


def test_pieces_begin_while_there_is_time(folder: Path) -> None:
    (folder / "three").write_text("time.sleep(60)")
    found = bench(folder, minutes=1.5 / 60)
    assert (found["first"].status, found["second"].status) == ("goes on", "not started")
    assert rows(folder) == ["one", "two"]
    assert found["said"][-1].split()[:3] == ["second", "not", "started"]


def test_only_some_units(folder: Path) -> None:
    found = bench(folder, "first", only=["two"])["first"]
    assert rows(folder) == ["two"]
    assert (found.status, found.words) == ("goes on", "1 rows; 2 units left")


def test_a_line_that_a_kill_cut_is_dropped(folder: Path) -> None:
    bench(folder, "first", only=["one"])
    for name in ("state.jsonl", "first.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"unit": "tw')
    assert bench(folder, "first")["first"].status == "done"
    assert rows(folder) == UNITS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_process_writes_the_state_and_exits_with_130(folder: Path, number: signal.Signals) -> None:
    (folder / "two").write_text("open(os.path.join(order['folder'], 'pid'), 'w').write(str(os.getpid())); time.sleep(60)")
    handler = signal.getsignal(signal.SIGTERM)

    def when_begun() -> None:
        while not ((folder / "pid").is_file() and (folder / "pid").read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=when_begun).start()
    done = CliRunner().invoke(cli.app, ["bench", "gpu", "--device", "cpu", "--out", str(folder)])
    assert done.exit_code == 130, done.output
    assert "the same command goes on from here" in done.output
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is handler
    (ended,) = state(folder, "ended")
    assert (ended["piece"], ended["exit"], ended["complete"]) == ("first", None, False)
    (folder / "two").unlink()
    assert {outcome.status for name, outcome in bench(folder).items() if name != "said"} == {"done"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pieces": ["third"]}, "bench gpu: 'third' is no piece; write some of first, second"),
        ({"size": "8b"}, "--size: '8b' is none of 7b, 13b, 1.1b, tiny"),
        ({"only": ["four"]}, "--only: 'four' is in the name of no unit of first, second, such as 'one'"),
        ({"tests": ["tests/nowhere"]}, "--tests: tests/nowhere is not there"),
    ],
)
def test_mistakes_are_one_line(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        gpu.bench(gpu.Request(**{"pieces": [], "folder": folder, "device": CPU, "size": "tiny"} | changes), lambda line: None)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "gpu", "--device", "cuda", "--out", str(tmp_path)])
    assert str(done.exception) == "--device: PyTorch finds no CUDA GPU here; write --device cpu"
