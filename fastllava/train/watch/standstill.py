"""When a run is stuck: what the processes of a run are at, whether they move, and what to think of one that is not heard of.

What counts as moving depends on what the main thread is at:

    FETCHING  a data worker begins or ends a sample, however long all of them take
    AGREEING, READING  the next phase begins, here or in any other process: who waits for one that moves is not stuck
    STEPPING, EVALUATING  the same, or the process computes; the first of each, which may compile for long, always move
    STARTING, WRITING  always: to prepare data, load weights or write a checkpoint takes what it takes

A run is stuck when a process waits for its workers, or all processes for each other, and nothing has moved for so many seconds;
or when a process has not been heard of for as long.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum

from fastllava.distributed.processes import Processes
from fastllava.train.watch.beats import Exchange, Message

TICK_SECONDS = 1.0
"""Between two looks, at most."""
_PATIENCE = 10.0
"""Times as long a process may be unheard of that moves always: a library may hold the interpreter while it reads or writes gigabytes."""
_FIRST_STEPS = 3
_BUSY = 0.02
"""Share of one core that a process uses which computes: more than what threads beside it need."""


class Phase(Enum):
    """What the main thread is at."""

    STARTING = "starting"
    FETCHING = "waiting for its data workers"
    AGREEING = "waiting for the other processes"
    STEPPING = "within a step"
    EVALUATING = "evaluating"
    READING = "waiting for a step's numbers"
    WRITING = "writing"

    @property
    def always_moves(self) -> bool:
        return self in (Phase.STARTING, Phase.WRITING)


@dataclass(frozen=True)
class Beat:
    """What a process tells the others of itself."""

    moves: int
    """Goes up when it has moved."""
    phase: Phase
    trouble: str | None
    """Why it will not go on, if it knows."""


class Motion:
    """Whether this process moves, as seen by a look at it now and then."""

    def __init__(self, tick: float) -> None:
        self._tick = tick
        self.at = self._entered = self._read = time.monotonic()
        """When it was looked at last."""
        self.moves = 0
        self._used = time.process_time()
        self._marks, self._board = -1, list[int]()

    @property
    def waited(self) -> float:
        """Seconds since it entered its phase, or since a data worker began or ended a sample."""
        return self.at - max(self._entered, self._read)

    def look(self, phase: Phase, marks: int, steps: int, board: Sequence[int]) -> bool:
        """Look: at the phase, how many phases and steps (or evaluations) have begun, the data workers' board. Whether time has stood still.

        It has when this process was stopped itself, as by Ctrl-Z, or the machine slept: then all clocks begin again.
        """
        now, used = time.monotonic(), time.process_time()
        slept, busy = now - self.at > 2 * self._tick + TICK_SECONDS, used - self._used > _BUSY * (now - self.at)
        entered, read = marks != self._marks, list(board) != self._board
        self._entered = now if entered or slept else self._entered
        self._read = now if read or slept else self._read
        first = steps <= _FIRST_STEPS
        computes = (phase in (Phase.STEPPING, Phase.EVALUATING) and (busy or first)) or (phase is Phase.READING and first)
        self.moves += entered or computes or phase.always_moves or (phase is Phase.FETCHING and read)
        self.at, self._used, self._marks, self._board = now, used, marks, list(board)
        return slept


class Judge:
    """What is to be thought of the beats of all processes: the first one thinks, the others follow it, unless it is the silent one."""

    def __init__(self, seconds: float, group: Processes, exchange: Exchange | None) -> None:
        self._seconds, self._group, self._exchange = seconds, group, exchange
        self.ended_at: float | None = None
        """When another process was found to have ended."""
        self.tells = group.first
        """Whether this process is the one that says what was found."""
        self._beats: dict[int, Message] = {}
        self._heard: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._left: set[int] = set()
        self._silent: list[int] = []

    def begin_again(self, now: float) -> None:
        """As if all had been heard of `now`."""
        self._heard = dict.fromkeys(self._heard, now)
        self._moved = dict.fromkeys(self._moved, now)

    def verdict(self, beat: Beat, now: float) -> str | None:
        """What this process should end with, or None, after its own `beat`."""
        own = {**asdict(beat), "phase": beat.phase.name}
        self._note(self._group.rank, own, now)
        if self._exchange is None:
            return beat.trouble or self._all_wait(now)
        for rank, message in self._exchange.receive():
            self._note(rank, message, now)
            if "verdict" in message:
                return message["verdict"]
        for rank, line in self._exchange.lines.items():
            self._heard.setdefault(rank, now)
            if line.closed and rank not in self._left:
                self._end(now)
        found = self._silence(now)
        if self._group.first:
            troubles = [beat["trouble"] for beat in self._beats.values() if beat.get("trouble")]
            found = next(iter(troubles), None) or found or self._all_wait(now)
        elif found is not None:
            self.tells = self._group.rank == 1
        own = own if found is None or not self._group.first else {"verdict": found}
        self._exchange.send(own if self.ended_at is None else {**own, "ended": True})
        return found

    def kill_silent(self) -> None:
        """A process that is stopped ends no other way."""
        for rank in self._silent:
            if self._exchange is not None and rank in self._exchange.peers:
                self._exchange.peers[rank].kill()

    def _note(self, rank: int, message: Message, now: float) -> None:
        self._heard[rank] = now
        if message.get("end") == "bye":
            self._left.add(rank)
        if message.get("end") == "failed" or message.get("ended"):
            self._end(now)
        if "moves" in message:
            if self._beats.get(rank, {}).get("moves") != message["moves"]:
                self._moved[rank] = now
            self._beats[rank] = message

    def _end(self, now: float) -> None:
        self.ended_at = now if self.ended_at is None else self.ended_at

    def _silence(self, now: float) -> str | None:
        """The complaint about a process that has not been heard of for long, if there is one."""
        assert self._exchange is not None  # noqa: S101 (the caller has looked)
        for rank in self._exchange.lines:
            silent, phase = now - self._heard[rank], self._beats.get(rank, {}).get("phase", Phase.STARTING.name)
            stopped = silent > self._seconds and self._exchange.peers[rank].stopped
            patience = _PATIENCE if Phase[phase].always_moves and not stopped else 1.0
            if rank not in self._left and self.ended_at is None and silent > patience * self._seconds:
                self._silent.append(rank)
                why = "it is stopped" if stopped else "it or its machine is stopped or cut off"
                return f"process {rank} has not been heard of for {silent:.0f} s, since it was {Phase[phase].value}: {why}"
        return None

    def _all_wait(self, now: float) -> str | None:
        still = now - max(self._moved.values(), default=now)
        # A little later than the trouble of one process would be known, which says more.
        if still <= self._seconds + min(2 * TICK_SECONDS, self._seconds / 2) or self.ended_at is not None:
            return None
        doing = ", ".join(f"process {rank} is {Phase[beat['phase']].value}" for rank, beat in sorted(self._beats.items()))
        return f"nothing has moved for {still:.0f} s: {doing}"
