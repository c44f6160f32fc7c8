"""What `fastllava bench gpu` keeps on disk: rows by piece, and state.jsonl, from which a run goes on where the last one stopped.

A piece is made of units, such as a room at a shape. state.jsonl is a log of events: a unit begun, done or stopped at a limit, a piece
ended, a piece to be measured again. Only events of the same code, device and size count; each row says its code too.
"""

import hashlib
import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benches.results import Row, append
from benches.world import REPO
from fastllava.errors import UserError

STATE = "state.jsonl"
BEGUN, DONE, STOPPED, ENDED, AGAIN = "begun", "done", "stopped", "ended", "again"
CHANCES = 2
"""How often a unit may be stopped without a row to show for it before it is given up."""
SOURCES = ("fastllava/**/*.py", "kernels/**/*.py", "kernels/**/tables/*.json", "benches/**/*.py")
TESTS = ("tests/**/*.py",)


@dataclass(frozen=True)
class Identity:
    """What results must agree in to belong together."""

    code: str
    """Of the sources; the same with and without a commit."""
    device: str
    """In words."""
    size: str


def code_of(patterns: Sequence[str], root: Path = REPO) -> str:
    """Twelve hexadecimal digits that change with any of the files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def mend(path: Path) -> None:
    """Drop a last line that a kill cut."""
    if path.is_file() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def read_rows(path: Path, code: str | None = None) -> list[Row]:
    """The whole lines of a file of rows, those of `code` where one is given; none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [row for row in rows if code is None or row["code"] == code]


class State:
    """The events of one piece that count: of one identity, since it was last to be measured again."""

    def __init__(self, folder: Path, piece: str, identity: Identity) -> None:
        self.folder, self.piece, self.identity = folder, piece, identity
        self.rows_file = folder / f"{piece}.jsonl"

    def note(self, event: str, unit: str | None = None, **facts: Any) -> None:
        """One event more."""
        line = {"piece": self.piece, "event": event, "unit": unit, "at": round(time.time()), **facts, **vars(self.identity)}
        append(self.folder / STATE, line)

    def events(self) -> list[Row]:
        """In order."""
        wanted = {"piece": self.piece, **vars(self.identity)}
        mine = [row for row in read_rows(self.folder / STATE) if wanted.items() <= row.items()]
        starts = [index for index, row in enumerate(mine) if row["event"] == AGAIN]
        return mine[starts[-1] + 1 :] if starts else mine

    def done(self) -> dict[str, Row]:
        """The last "done" of each unit that has one."""
        return {event["unit"]: event for event in self.events() if event["event"] == DONE}

    def rows(self) -> list[Row]:
        """Of this code, since the piece was last to be measured again."""
        rows, since = read_rows(self.rows_file), 0
        for event in read_rows(self.folder / STATE):
            if event["piece"] == self.piece and event["event"] == AGAIN:
                since = event["rows"]
        return [row for row in rows[since:] if row["code"] == self.identity.code]

    def count(self) -> int:
        """Rows of the file, whatever their code."""
        return len(read_rows(self.rows_file))

    def again(self) -> None:
        """Forget what was done."""
        self.note(AGAIN, rows=self.count())

    def settle(self, exit_code: int | None, reason: str) -> None:
        """After a child ended and left a unit begun: one that had nothing to show has one chance more, if it was stopped, else none.

        exit_code: None for a child that was stopped at its limit.
        """
        events = [event for event in self.events() if event["event"] in (BEGUN, DONE, STOPPED)]
        last = events[-1] if events else None
        if last is None or last["event"] != BEGUN or self.count() > last["rows"]:
            return
        self.note(STOPPED, last["unit"], reason=reason)
        stops = sum(event["event"] == STOPPED and event["unit"] == last["unit"] for event in events) + 1
        if exit_code is not None or stops >= CHANCES:
            self.note(DONE, last["unit"], failed=True, broke=True, error=reason, seconds=None)


class DeviceLost(BaseException):
    """The GPU takes no more work from this process: no unit's own business, and the next process may go on."""


class Notebook:
    """Where a child writes: rows as they come, units as they begin and end."""

    def __init__(self, state: State, device: torch.device) -> None:
        self.state, self.device = state, device
        self._failure: str | None = None

    def row(self, row: Row, failure: str | None = None) -> None:
        """One row more; `failure`: what is wrong about it, in words."""
        append(self.state.rows_file, strict(row) | {"code": self.state.identity.code})
        self._failure = self._failure or failure

    @contextmanager
    def unit(self, name: str) -> Iterator[None]:
        """What is measured within is `name`; an error ends that unit only. Raises DeviceLost where the GPU does not go on."""
        self.state.note(BEGUN, name, rows=self.state.count())
        self._failure, error = None, None
        began = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            error = "out of memory"
        except UserError as mistake:
            error = str(mistake)
        except Exception as problem:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {next(iter(str(problem).strip().splitlines()), '')}"
        said, broke = error or self._failure, error is not None
        self.state.note(DONE, name, failed=said is not None, broke=broke, error=said, seconds=round(time.monotonic() - began, 2))
        if broke and not usable(self.device):
            raise DeviceLost(error)


def strict(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have: a row is worth more than its one odd figure."""
    if isinstance(value, dict):
        return {key: strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def usable(device: torch.device) -> bool:
    """Whether `device` still takes work: after an illegal access a process gets nothing but errors from its GPU."""
    if device.type != "cuda":
        return True
    try:
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
