"""A list of commands of the benches, run unattended within a time limit: what breaks stops nothing else, and what is stopped goes on."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benches.lib.results import Row, Say, append, mend, read
from benches.lib.world import world

GRACE = 5.0
"""Seconds from being asked to end to being killed."""
LOST_GPU = 75
"""Exit code of a command whose GPU takes no more work from its process: the next process goes on."""
DONE, GOES_ON, FAILED, NOT_STARTED = "done", "goes on", "failed", "not started"
STOPPED, BROKE, LOST = "stopped", "broke", "lost"


@dataclass(frozen=True)
class Command:
    """The words of a command of `fastllava bench`."""

    words: tuple[str, ...]
    parts: "tuple[Command, ...]" = ()
    """Smaller commands to run in place of this one where it broke off."""

    def __str__(self) -> str:
        return shlex.join(self.words)


def program(words: Sequence[str]) -> list[str]:
    """The command line of a command of the benches."""
    # -P: with this folder on the import path, transformers would take its kernels.py for a library of Hugging Face.
    return [sys.executable, "-P", str(Path(__file__).resolve().parents[1] / "__main__.py"), *words]


def environment(device: str) -> dict[str, str]:
    """The environment of the processes: on a GPU Triton compiles, whatever the shell says; without one tests want its interpreter."""
    return os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0" if device == "cuda" else "1"}


@dataclass(frozen=True)
class Outcome:
    """What came of a piece."""

    piece: str
    status: str
    """DONE, GOES_ON, FAILED or NOT_STARTED."""
    words: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Piece:
    """Commands whose rows lie in one file. Their ends are kept beside it, each with the code and device that it is about."""

    name: str
    commands: Sequence[Command]
    folder: Path
    device: str
    """cpu or cuda."""
    identity: Row
    """`code` and `device` in words; what was done with others is not done."""
    say: Say

    @property
    def rows(self) -> Path:
        """The file of rows."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def log(self) -> Path:
        """The file of all that the commands print."""
        return self.folder / f"{self.name}.log"

    @property
    def state(self) -> Path:
        """The file of the commands' ends."""
        return self.folder / f"{self.name}.state"

    def run(self, seconds: float) -> Outcome:
        """Run what is left, for at most so many seconds."""
        began, stopped, todo = time.monotonic(), False, self.todo()
        if not todo:
            self.say(f"{self.name}: complete with this code and device, so skipped; --again measures anew")
        while todo and not stopped and (rest := seconds - (time.monotonic() - began)) > 0:
            stopped = self._one(todo[0], rest) == STOPPED
            todo = self.todo()
        outcome = self._outcome(time.monotonic() - began)
        self.say(f"{self.name}: {outcome.status} in {outcome.seconds:.0f} s: {outcome.words}")
        return outcome

    def todo(self) -> list[Command]:
        """The commands that are left, in their order; in place of one that broke off the smaller ones that it is made of."""
        return [left for command in self.commands for left in self._open(command)]

    def _open(self, command: Command) -> list[Command]:
        ends = self._ends(command)
        if not ends or ends[-1]["end"] == LOST or (ends[-1]["end"] == STOPPED and not _given_up(ends)):
            return [command]
        if ends[-1]["end"] in (DONE, FAILED):
            return []
        return [left for part in command.parts for left in self._open(part)]

    def _ends(self, command: Command) -> list[Row]:
        """How it ended each time, with this code and device."""
        wanted = {"command": str(command), **self.identity}
        return [line for line in read(self.state) if wanted.items() <= line.items()]

    def _one(self, command: Command, seconds: float) -> str:
        """Run a command for at most so many seconds, and note how it ended."""
        mend(self.rows)
        before, began, code = len(read(self.rows)), time.monotonic(), None
        words = [*command.words, "--device", self.device, "--resume"]
        try:
            code = self._process([*words, "--out", str(self.rows)], seconds)
        finally:
            new = len(read(self.rows)) - before
            # A test that took the GPU with it has a row, and is not run again.
            end = {None: STOPPED, 0: DONE, 1: FAILED, LOST_GPU: LOST if new else BROKE}.get(code, BROKE)
            facts = {"command": str(command), "end": end, "exit": code, "seconds": round(time.monotonic() - began, 1), "rows": new}
            last = _last_line(self.log)
            append(
                self.state,
                {**facts, "said": last, "at": round(time.time()), **self.identity, "commit": world(torch.device("cpu"))["commit"]},
            )
        return end

    def _process(self, words: Sequence[str], seconds: float) -> int | None:
        """The exit code; None where it was stopped after so many seconds."""
        with self.log.open("ab") as log:
            log.write(f"--- {shlex.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                program(words), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment(self.device), process_group=0, preexec_fn=_end_with_parent,
            )  # fmt: skip
            try:
                return process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end_group(process)

    def set_aside(self) -> None:
        """Move what was measured before to a folder of its own."""
        folder = self.folder / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
        for path in (path for path in (self.rows, self.log, self.state) if path.exists()):
            folder.mkdir(exist_ok=True)
            path.rename(folder / path.name)

    def _outcome(self, seconds: float) -> Outcome:
        """How it stands now."""
        errors = [f"{command}: {_why(ends)}" for command in self._all(self.commands) if _is_error(ends := self._ends(command))]
        left = len(self.todo())
        words = f"{len(read(self.rows))} rows" + (f"; {left} commands left" if left else "")
        status = FAILED if errors else GOES_ON if left else DONE
        return Outcome(self.name, status, f"{errors[0]} ({words})" if errors else words, seconds)

    def _all(self, commands: Sequence[Command]) -> Iterator[Command]:
        for command in commands:
            yield command
            yield from self._all(command.parts)


def _given_up(ends: Sequence[Row]) -> bool:
    """Whether it was stopped twice without a row to show for it."""
    return len(ends) > 1 and all(end["end"] == STOPPED and not end["rows"] for end in ends[-2:])


def _is_error(ends: Sequence[Row]) -> bool:
    return bool(ends) and (ends[-1]["end"] in (FAILED, BROKE) or _given_up(ends))


def _why(ends: Sequence[Row]) -> str:
    code, said = ends[-1]["exit"], ends[-1]["said"]
    if code is None:
        return f"no end within {ends[-1]['seconds'] / 60:.1f} min"
    return f"signal {signal.Signals(-code).name}" if code < 0 else said or f"exit code {code}"


def _last_line(log: Path) -> str:
    """What a command said last; nothing where it said nothing."""
    last = next((line for line in reversed(log.read_text(encoding="utf-8", errors="replace").splitlines()) if line.strip()), "")
    return "" if last.startswith("--- ") else last.removeprefix("error: ")


def _end_with_parent() -> None:
    """On Linux, in a new process: it must not keep the GPU when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _end_group(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it has started: asked first, then killed."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that waits for its driver may not end at once even so.
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether something is wrong, rather than only not there yet."""
    return any(outcome.status == FAILED for outcome in outcomes)
