"""`fastllava bench gpu`: all that a GPU is wanted for, for someone who has it for minutes: pieces in the order of their worth.

Each piece runs in a process of its own for at most 8 minutes and writes DIR/<piece>.jsonl and DIR/<piece>.log. What is stopped goes on
the next time: DIR/state.jsonl says what is done. Rows are those of the other benches, so with DIR = benches/results/NAME
`fastllava bench report` puts them into the tables of the documents.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benches.gpu.child import LOST, Order, world_command
from benches.gpu.pieces import PIECES
from benches.gpu.state import ENDED, SOURCES, STATE, TESTS, Identity, State, code_of, mend
from benches.peer_trials import check_device
from benches.world import REPO, world
from fastllava.errors import UserError
from fastllava_kernels.llava15 import DECODERS

LIMIT = 480.0
"""Seconds of a piece."""
LEAST = 30.0
"""Seconds left from which a piece is begun; of a budget that is shorter, half of it."""
GRACE = 5.0
"""Seconds from being asked to end to being killed."""
DONE, GOES_ON, FAILED, NOT_STARTED = "done", "goes on", "failed", "not started"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to measure."""

    pieces: Sequence[str]
    """All when empty; in the order of PIECES, whatever the order here."""
    folder: Path
    device: torch.device
    size: str
    minutes: float | None = None
    only: Sequence[str] = ()
    """Words: units that hold one of them; all when empty."""
    tests: Sequence[str] = ()
    """Paths for piece `tests`; its own when empty."""
    again: bool = False

    def check(self) -> None:
        """Raises UserError for what is nothing to measure."""
        for name in self.pieces:
            if name not in PIECES:
                raise UserError(f"bench gpu: '{name}' is no piece; write some of {', '.join(PIECES)}")
        if self.size not in DECODERS:
            raise UserError(f"--size: '{self.size}' is none of {', '.join(DECODERS)}")
        check_device(self.device)
        units = [unit for piece in self.chosen for unit in self.units(piece)]
        for word in self.only:
            if not any(word in unit for unit in units):
                raise UserError(f"--only: '{word}' is in the name of no unit of {', '.join(self.chosen)}, such as '{units[0]}'")
        for path in self.tests:
            if not (REPO / path.partition("::")[0]).exists():
                raise UserError(f"--tests: {path} is not there; write paths from the checkout's root, such as tests/kernels")

    def units(self, piece: str) -> list[str]:
        """All that `piece` is made of."""
        return [",".join(self.tests)] if piece == "tests" and self.tests else PIECES[piece].units(self.size)

    @property
    def chosen(self) -> list[str]:
        """The pieces in their order."""
        return [name for name in PIECES if not self.pieces or name in self.pieces]


@dataclass(frozen=True)
class Outcome:
    """Of a piece."""

    piece: str
    status: str
    """DONE, GOES_ON, FAILED or NOT_STARTED."""
    words: str
    seconds: float = 0.0


def bench(request: Request, say: Say) -> list[Outcome]:
    """Measure what is asked for, as far as the time goes. Raises UserError on unknown names, KeyboardInterrupt after Ctrl-C or SIGTERM."""
    request.check()
    request.folder.mkdir(parents=True, exist_ok=True)
    mend(request.folder / STATE)
    began = time.monotonic()
    identities = identities_of(request)
    outcomes: list[Outcome] = []
    with _stops_as_ctrl_c():
        for name in request.chosen:
            left = None if request.minutes is None else 60 * request.minutes - (time.monotonic() - began)
            outcomes.append(_Piece(request, name, identities[name], say).run(left))
    for line in table(outcomes):
        say(line)
    return outcomes


def identities_of(request: Request) -> dict[str, Identity]:
    """By piece; the tests' code is part of that of piece `tests` only."""
    if request.device.type == "cpu":
        here: Mapping[str, Any] = world(request.device)
    else:
        done = subprocess.run(world_command("cuda"), capture_output=True, text=True, env=environment("cuda"), check=False)
        if done.returncode:
            last = next(iter(reversed(done.stderr.strip().splitlines())), "no message")
            raise UserError(f"--device: a process that uses the GPU ended with {done.returncode}: {last}")
        here = json.loads(done.stdout.strip().splitlines()[-1])
    plain, with_tests = code_of(SOURCES), code_of((*SOURCES, *TESTS))
    return {name: Identity(with_tests if name == "tests" else plain, here["device"], request.size) for name in request.chosen}


def environment(device: str) -> dict[str, str]:
    """Of the processes: on a GPU Triton compiles, whatever the shell says; without one tests want its interpreter."""
    return os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0" if device == "cuda" else "1"}


class _Piece:
    """A piece of this request, run to its end, its limit or its last unit."""

    def __init__(self, request: Request, name: str, identity: Identity, say: Say) -> None:
        self.request, self.name, self.identity, self.say = request, name, identity, say
        self.piece = PIECES[name]
        self.state = State(request.folder, name, identity)
        mend(self.state.rows_file)

    def run(self, left: float | None) -> Outcome:
        """left: seconds of the whole budget; None for as long as it takes."""
        if self.request.again:
            self.state.again()
        if not self._todo():
            self.say(f"{self.name}: complete with this code, device and size, so skipped; --again measures anew")
            return self._outcome(0.0)
        if left is not None and left < min(LEAST, 30 * (self.request.minutes or 0.0)):
            return Outcome(self.name, NOT_STARTED, "no time left")
        limit = LIMIT if left is None else min(LIMIT, left)
        todo = self._todo()
        self.say(f"{self.name}: {self.piece.summary}; {len(todo)} to do, at most {limit / 60:.1f} min; {self.name}.log, {self.name}.jsonl")
        began = time.monotonic()
        code: int | None = 0
        try:
            while (todo := self._todo()) and (rest := limit - (time.monotonic() - began)) > 0:
                before = self.state.count()
                code = self._child(todo, rest)
                mend(self.state.rows_file)
                mend(self.request.folder / STATE)
                how = f"no end within {rest / 60:.1f} min" if code is None else f"the process ended with {in_words(code)}"
                self.state.settle(code, how)
                if code is None:
                    break
                if code not in (0, LOST) and (self._todo(), self.state.count()) == (todo, before):
                    # It died before it came to its first unit.
                    return self._close(code, began, how)
        except KeyboardInterrupt:
            self._close(None, began, None)
            raise
        return self._close(code, began, None)

    def _todo(self) -> list[str]:
        """Units that are left, in their order; in place of one that broke off the smaller ones that it is made of."""
        words = self.request.only
        return [unit for unit in self._left() if not words or any(word in unit for word in words)]

    def _left(self) -> list[str]:
        done, left = self.state.done(), []
        for unit in self.request.units(self.name):
            if unit not in done:
                left.append(unit)
            elif done[unit]["broke"]:
                left += [part for part in self.piece.split(unit) if part not in done]
        return left

    def _child(self, todo: Sequence[str], seconds: float) -> int | None:
        """The exit code of a process that does these units; None where it was stopped after so many seconds."""
        device = self.request.device.type
        order = Order(self.name, str(self.request.folder.resolve()), device, self.identity, list(todo))
        with (self.request.folder / f"{self.name}.log").open("ab") as log:
            process = subprocess.Popen(
                order.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment(device), process_group=0
            )
            try:
                return process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end_group(process)

    def _close(self, code: int | None, began: float, broke: str | None) -> Outcome:
        seconds = time.monotonic() - began
        outcome = self._outcome(seconds, broke)
        facts = {"exit": code, "seconds": round(seconds, 1), "complete": not self._left(), "failed": outcome.status == FAILED}
        self.state.note(ENDED, **facts, commit=_commit(), words=outcome.words)
        self.say(f"{self.name}: {outcome.status} in {seconds:.0f} s: {outcome.words}")
        return outcome

    def _outcome(self, seconds: float, broke: str | None = None) -> Outcome:
        """As of now."""
        done, left = self.state.done(), self._left()
        errors = [f"{unit}: {first_line(event['error'])}" for unit, event in done.items() if event["failed"]]
        errors += [broke] if broke else []
        words = self.piece.words(self.state.rows())
        if left:
            words += f"; {len(left)} units left"
        status = FAILED if errors else GOES_ON if left else DONE
        return Outcome(self.name, status, f"{errors[0]} ({words})" if errors else words, seconds)


def first_line(text: str) -> str:
    """Of a message."""
    return next(iter(text.splitlines()), "")


def in_words(code: int) -> str:
    """Of an exit code."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _commit() -> str | None:
    return world(torch.device("cpu"))["commit"]


def _end_group(process: subprocess.Popen) -> None:
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


@contextmanager
def _stops_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, such as of `timeout`, is treated as Ctrl-C is: the state is written and the piece's process ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line a piece."""
    width = max(len(outcome.piece) for outcome in outcomes)
    for outcome in outcomes:
        yield f"{outcome.piece:{width}}  {outcome.status:{len(NOT_STARTED)}}  {outcome.seconds:6.0f} s  {outcome.words}"


def failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether something is wrong, rather than only not there yet."""
    return any(outcome.status == FAILED for outcome in outcomes)
