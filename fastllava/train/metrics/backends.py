"""TensorBoard, Weights & Biases and trackio beside metrics.jsonl: each in a thread of its own, so that none can fail or hold a run.

A run that resumes goes on in the same curve: Weights & Biases and trackio under the name that is kept in `output_dir/backends.json`,
TensorBoard with what was logged from the first step on taken back (`purge_step`). Each value carries the number of its step.
"""

import hashlib
import importlib
import importlib.util
import json
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from fastllava.config import Config, LogConfig, as_written
from fastllava.console.speaker import speaker
from fastllava.disk import read_json_object, write_json
from fastllava.errors import UserError

KEPT_FILE = "backends.json"
OPENING_SECONDS = 20.0
"""How long a run waits at its start for a backend, which may ask the user to log in."""
CLOSING_SECONDS = 30.0
"""How long it waits at its end for what a backend has not sent yet."""
_FAILED_CLOSING_SECONDS = 5.0
_ROWS_WAITING = 10_000

ANSWERS = "samples"
"""The key of an evaluation's questions and answers; the row of a step has a number under it."""
_COLUMNS = ("question", "answer", "reference")

Row = Mapping[str, Any]
"""Numbers, and perhaps a list of questions and answers under ANSWERS."""
Opened = tuple[Callable[[Row], Any], Callable[[], Any]]
"""How to log a row, and how to finish."""


def check_backends(log: LogConfig) -> None:
    """Raises UserError for a backend that is not installed."""
    for name in log.backends:
        if sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
            raise UserError(f"log.backends: {name} is not installed; run pip install 'fastllava[{name}]' or take it off the list")


class Backend:
    """One of them. It opens at once; whatever goes wrong is said once, and the training goes on without it."""

    def __init__(self, name: str, config: Config, first_step: int) -> None:
        self.name = name
        self._rows: queue.Queue[Row | None] = queue.Queue(_ROWS_WAITING)
        self._failed = threading.Event()
        self._opened, self._ended = threading.Event(), threading.Event()
        # A daemon: one that hangs does not keep the process.
        threading.Thread(target=self._run, args=(config, first_step), name=name, daemon=True).start()
        if not self._opened.wait(OPENING_SECONDS):
            _say(f"log.backends: {name} has not started after {OPENING_SECONDS:.0f} s; training begins, its rows wait for it")

    def write(self, row: Row) -> None:
        """Hand over a step's row; never waits."""
        if self._failed.is_set():
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._fail(f"{_ROWS_WAITING} rows wait for it")

    def write_again(self, row: Row) -> None:
        """Hand over a row of before, of the step that the run goes on with, to a backend that takes back what it has from there on."""
        if self.name == "tensorboard":
            self.write(row)

    def close(self, *, after_failure: bool = False) -> None:
        """Let it finish what it has, for CLOSING_SECONDS at most."""
        if self._failed.is_set():
            return
        seconds = _FAILED_CLOSING_SECONDS if after_failure else CLOSING_SECONDS
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            self._failed.set()
        if not self._ended.wait(seconds):
            self._fail(f"it did not finish within {seconds:.0f} s")

    def _run(self, config: Config, first_step: int) -> None:
        try:
            log, finish = _OPEN[self.name](config, first_step)
            self._opened.set()
            while (row := self._rows.get()) is not None:
                log(row)
            finish()
        except BaseException as error:  # whatever a network logger raises, an exit of its own too, is not worth a training run
            self._fail(f"{type(error).__name__}: {error}")
        self._opened.set()
        self._ended.set()

    def _fail(self, reason: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            _say(f"log.backends: {self.name} failed and is off from here on ({reason}); metrics.jsonl has every row")


def _say(line: str) -> None:
    speaker(Console(stderr=True))(line)


def _open_tensorboard(config: Config, first_step: int) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(config.output_dir / "tensorboard"), purge_step=first_step)

    def log(row: Row) -> None:
        for key, value in row.items():
            if isinstance(value, list):
                writer.add_text(key, as_markdown(value), row["step"])
            else:
                writer.add_scalar(key, value, row["step"])

    return log, writer.close


def _open_wandb(config: Config, first_step: int) -> Opened:
    module: Any = importlib.import_module("wandb")
    known = _known_by("wandb", config, first_step)
    # What it keeps on disk, all that there is where it is offline, lies in output_dir.
    module.init(**_described(config), name=_name(config), id=known, resume="allow", dir=str(config.output_dir))

    def table(answers: list[dict[str, Any]]) -> Any:
        return module.Table(columns=list(_COLUMNS), data=[[one.get(name) for name in _COLUMNS] for one in answers])

    return lambda row: module.log(_with_answers(row, table), step=row["step"]), module.finish


def _open_trackio(config: Config, first_step: int) -> Opened:
    module: Any = importlib.import_module("trackio")
    # Its runs are known by their name.
    known = _known_by("trackio", config, first_step)
    module.init(**_described(config), name=f"{_name(config)}-{known}", resume="allow")
    return lambda row: module.log(_with_answers(row, as_markdown), step=row["step"]), module.finish


def _with_answers(row: Row, shown: Callable[[list[dict[str, Any]]], Any]) -> dict[str, Any]:
    """A row as a tracker takes it, with what is `shown` of questions and answers."""
    return {key: shown(value) if isinstance(value, list) else value for key, value in row.items()}


def as_markdown(answers: list[dict[str, Any]]) -> str:
    """Questions and answers as a table in Markdown."""

    def cell(value: Any) -> str:
        return " ".join(str("" if value is None else value).split()).replace("|", "\\|")

    rows = [[cell(one.get(name)) for name in _COLUMNS] for one in answers]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (_COLUMNS, ["---"] * len(_COLUMNS), *rows))


_OPEN: dict[str, Callable[[Config, int], Opened]] = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio}


def _name(config: Config) -> str:
    return config.output_dir.absolute().name or "run"


def _described(config: Config) -> dict[str, Any]:
    """What leaves this machine: without secrets."""
    values = as_written(config)
    return {"project": values["log"]["project"], "config": values}


def _known_by(name: str, config: Config, first_step: int) -> str:
    """The id under which backend `name` knows the run in output_dir: kept there, or drawn and kept.

    Without a step to go on from, that of the run which was begun there with the same config.
    """
    path = config.output_dir / KEPT_FILE
    values = as_written(config)
    training = hashlib.sha256(json.dumps({**values, "log": None}, sort_keys=True).encode()).hexdigest()
    try:
        kept = read_json_object(path)
    except (OSError, ValueError):
        kept = {}
    entry = kept.get(name)
    if isinstance(entry, dict) and isinstance(entry.get("id"), str) and (first_step > 0 or entry.get("training") == training):
        return entry["id"]
    drawn = uuid.uuid4().hex[:12]
    write_json(path, {**kept, name: {"id": drawn, "training": training}})
    return drawn
