"""Commands run unattended: what is stopped goes on, what breaks stops nothing else, nothing is lost.

The processes are stand-ins that write what real ones write; test_gpu.py has real ones.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benches import cli, gpu
from benches.lib import unattended
from benches.lib.unattended import Command, Outcome
from fastllava.errors import UserError

UNITS = ["one", "two", "three"]
STAND_IN = """
import json, os, signal, sys, time
unit, rows = sys.argv[1], sys.argv[sys.argv.index("--out") + 1]
here = os.path.dirname(rows)
def write(name):
    with open(rows, "a") as file:
        file.write(json.dumps({"unit": name}) + "\\n")
print("began", unit, flush=True)
if os.path.exists(os.path.join(here, unit)):
    exec(open(os.path.join(here, unit)).read())
write(unit)
"""
"""A file with the name of a command holds what its process does."""


def units(split: bool = False) -> Callable[[Any], Any]:
    """A piece of three commands; with `split` each is made of two smaller ones."""

    def piece(request: Any) -> Any:
        """A piece of three commands."""
        for unit in UNITS:
            yield Command((unit,), tuple(Command((f"{unit}.{part}",)) for part in "ab") if split else ())

    return piece


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """For results; the pieces are `first` and `second`, and only the commands of the second can be split."""
    monkeypatch.setattr(gpu, "PIECES", {"first": units(), "second": units(split=True)})
    monkeypatch.setattr(gpu, "device_of", lambda request: "here")
    monkeypatch.setattr(gpu, "code_of", lambda patterns: "code")
    monkeypatch.setattr(unattended, "program", lambda words: [sys.executable, "-c", STAND_IN, *words])
    return tmp_path


def bench(folder: Path, *names: str, **changes: Any) -> dict[str, Outcome]:
    """Outcomes by piece."""
    return {outcome.piece: outcome for outcome in gpu.bench(gpu.Request(names, folder, "cpu", "tiny", **changes), lambda line: None)}


def rows(folder: Path, piece: str = "first") -> list[str]:
    return [json.loads(line)["unit"] for line in (folder / f"{piece}.jsonl").read_text().splitlines()]


def ends(folder: Path, piece: str = "first") -> list[tuple[str, str]]:
    """(command, how it ended), in order."""
    return [(line["command"], line["end"]) for line in map(json.loads, (folder / f"{piece}.state").read_text().splitlines())]


def test_what_is_complete_is_skipped_until_it_is_asked_for_again(folder: Path) -> None:
    found = bench(folder)
    assert (found["first"].status, found["second"].status) == ("done", "done")
    assert found["first"].words == "3 rows"
    assert rows(folder) == UNITS
    assert ends(folder) == [(unit, "done") for unit in UNITS]
    line = json.loads((folder / "first.state").read_text().splitlines()[0])
    assert {"commit", "code", "device", "seconds", "exit", "at"} <= set(line)
    assert [line for line in (folder / "first.log").read_text().splitlines() if "---" not in line] == [f"began {unit}" for unit in UNITS]
    said: list[str] = []
    gpu.bench(gpu.Request(["first"], folder, "cpu", "tiny"), said.append)
    assert "first: complete with this code and device, so skipped; --again measures anew" in said
    assert rows(folder) == UNITS
    assert bench(folder, "first", again=True)["first"].words == "3 rows"
    assert rows(folder) == UNITS
    (before,) = folder.glob("before-*")
    assert rows(before) == UNITS


@pytest.mark.parametrize("change", ["code", "device"])
def test_other_code_or_another_device_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    bench(folder, "first")
    monkeypatch.setattr(gpu, {"code": "code_of", "device": "device_of"}[change], lambda given: "other")
    bench(folder, "first")
    assert rows(folder) == UNITS * 2


def test_stopped_at_its_limit_a_piece_keeps_its_rows_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "two").write_text("write('half of two'); time.sleep(60)")
    monkeypatch.setattr(gpu, "LIMIT", 2.0)
    found = bench(folder, "first")["first"]
    assert (found.status, found.words) == ("goes on", "2 rows; 2 commands left")
    assert not unattended.failed([found])
    assert rows(folder) == ["one", "half of two"]
    assert ends(folder) == [("one", "done"), ("two", "stopped")]
    # However often: a command that has rows to show for its time is not given up.
    assert bench(folder, "first")["first"].status == "goes on"
    (folder / "two").unlink()
    monkeypatch.setattr(gpu, "LIMIT", 30.0)
    assert bench(folder, "first")["first"].status == "done"
    assert rows(folder) == ["one", "half of two", "half of two", "two", "three"]


def test_a_command_that_never_ends_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "one").write_text("time.sleep(60)")
    monkeypatch.setattr(gpu, "LIMIT", 0.5)
    assert bench(folder, "first")["first"].status == "goes on"
    found = bench(folder, "first")["first"]
    assert found.status == "failed"
    assert found.words.startswith("one: no end within 0.0 min (")
    monkeypatch.setattr(gpu, "LIMIT", 30.0)
    assert bench(folder, "first")["first"].status == "failed"
    assert rows(folder) == ["two", "three"]


def test_a_process_that_dies_takes_its_command_with_it_and_no_other(folder: Path) -> None:
    (folder / "two").write_text("os.kill(os.getpid(), signal.SIGSEGV)")
    found = bench(folder)
    assert (found["first"].status, found["first"].words) == ("failed", "two: signal SIGSEGV (2 rows)")
    assert unattended.failed([found["first"]])
    assert rows(folder) == ["one", "three"]
    # A command that can be cut is: its parts are tried one by one.
    assert rows(folder, "second") == ["one", "two.a", "two.b", "three"]


def test_after_a_lost_gpu_another_process_goes_on(folder: Path) -> None:
    once = f"open(here + '/again', 'w'); write('half'); sys.exit({unattended.LOST_GPU})"
    (folder / "two").write_text(f"if not os.path.exists(here + '/again'):\n    {once}")
    assert bench(folder, "first")["first"].status == "done"
    assert rows(folder) == ["one", "half", "two", "three"]
    (folder / "two").write_text(f"sys.exit({unattended.LOST_GPU})")
    assert bench(folder, "first", again=True)["first"].status == "failed"
    assert ends(folder) == [("one", "done"), ("two", "broke"), ("three", "done")]


def test_a_wrong_result_is_a_failure_and_the_command_is_done(folder: Path) -> None:
    (folder / "one").write_text("write(unit); print('swiglu triton: wrong, by far', file=sys.stderr); sys.exit(1)")
    found = bench(folder, "second")["second"]
    assert (found.status, found.words) == ("failed", "one: swiglu triton: wrong, by far (3 rows)")
    assert rows(folder, "second") == UNITS


def test_pieces_begin_while_there_is_time(folder: Path) -> None:
    (folder / "three").write_text("time.sleep(60)")
    found = bench(folder, minutes=2.5 / 60)
    assert (found["first"].status, found["second"].status) == ("goes on", "not started")
    assert rows(folder) == ["one", "two"]


def test_a_line_that_a_kill_cut_is_dropped(folder: Path) -> None:
    bench(folder, "first")
    for name in ("first.state", "first.jsonl"):
        path = folder / name
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]) + '{"command": "tw')
    assert bench(folder, "first")["first"].status == "done"
    assert ends(folder) == [(unit, "done") for unit in UNITS]
    assert (folder / "first.jsonl").read_text().count("\n") >= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_process_writes_the_state_and_exits_with_130(folder: Path, number: signal.Signals) -> None:
    (folder / "two").write_text("open(here + '/pid', 'w').write(str(os.getpid())); time.sleep(60)")
    handler = signal.getsignal(signal.SIGTERM)

    def when_begun() -> None:
        while not ((folder / "pid").is_file() and (folder / "pid").read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=when_begun).start()
    done = CliRunner().invoke(cli.app, ["gpu", "--device", "cpu", "--out", str(folder)])
    assert done.exit_code == 130, done.output
    assert "the same command goes on from here" in done.output
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert ends(folder) == [("one", "done"), ("two", "stopped")]
    (folder / "two").unlink()
    assert {outcome.status for outcome in bench(folder).values()} == {"done"}


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that tells a process of its parent's end")
def test_a_process_whose_parent_is_killed_ends(folder: Path) -> None:
    (folder / "one").write_text("open(here + '/pid', 'w').write(str(os.getpid())); time.sleep(60)")
    child = os.fork()
    if child == 0:
        bench(folder, "first")
        os._exit(0)
    while not ((folder / "pid").is_file() and (folder / "pid").read_text()):
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(100):
        if not Path(f"/proc/{(folder / 'pid').read_text()}/cmdline").is_file():
            return
        time.sleep(0.05)
    stat = Path(f"/proc/{(folder / 'pid').read_text()}/stat").read_text()
    assert stat.split()[2] == "Z"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pieces": ["third"]}, "bench gpu: 'third' is no piece; write some of first, second"),
        ({"size": "8b"}, "--size: '8b' is none of 7b, 13b, 1.1b, tiny"),
    ],
)
def test_mistakes_are_one_line(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        gpu.bench(gpu.Request(**{"pieces": [], "folder": folder, "device": "cpu", "size": "tiny"} | changes), lambda line: None)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["gpu", "--device", "cuda", "--out", str(tmp_path)])
    assert str(done.exception) == "--device: PyTorch finds no CUDA GPU here; write --device cpu"
