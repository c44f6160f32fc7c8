"""Backends beside metrics.jsonl: none stops, holds or bends a run, and a run that resumes goes on in its curve."""

import json
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fastllava.config import LogConfig, check_config
from fastllava.errors import UserError
from fastllava.train.metrics import backends
from fastllava.train.metrics.backends import Backend, check_backends
from fastllava.train.metrics.log import Metrics, for_backends


class Wandb(SimpleNamespace):
    """Stands in for the package; notes what it is told. `breaks`: where it raises; `hangs`: where it never returns."""

    def __init__(self, breaks: str = "", hangs: str = "") -> None:
        super().__init__(inits=[], rows=[], finished=0, breaks=breaks, hangs=hangs)

    def at(self, place: str) -> None:
        if self.breaks == place:
            raise ConnectionError("[/red] is unreachable")
        if self.hangs == place:
            threading.Event().wait()

    def init(self, **given: Any) -> None:
        self.inits.append(given)
        self.at("init")

    def log(self, row: dict[str, Any], step: int) -> None:
        self.at("log")
        self.rows.append((step, row))

    def finish(self) -> None:
        self.at("finish")
        self.finished += 1


def through(monkeypatch, config, fake: Wandb, first_step: int = 0, name: str = "wandb") -> Wandb:
    """The calls that `fake` got from a run of two steps."""
    monkeypatch.setitem(sys.modules, name, fake)
    backend = Backend(name, config, first_step)
    for step in (first_step, first_step + 1):
        backend.write({"step": step, "loss": 1.0})
    backend.close()
    return fake


@pytest.fixture
def config(settings, tmp_path):
    (tmp_path / "run").mkdir()
    return check_config(settings(log={"backends": ["wandb"], "project": "https://me:s3krit@host/p"}))


def test_a_run_is_told_with_its_steps_and_without_secrets(config, monkeypatch, tmp_path):
    fake = through(monkeypatch, config, Wandb())
    assert [step for step, _ in fake.rows] == [0, 1]
    assert fake.finished == 1
    [init] = fake.inits
    assert init["dir"] == str(tmp_path / "run")
    assert init["config"]["stage"] == "pretrain"
    assert "s3krit" not in json.dumps(init)


EVALUATED = {
    "step": 4,
    "held_out_loss": 1.5,
    "held_out_set": "0123",
    "eval_seconds": 0.1,
    "samples": [{"id": 7, "question": "Is it | or\n-?", "answer": "a | b"}, {"id": 8, "question": "q", "answer": None, "reference": "r"}],
}
TABLE = """\
| question | answer | reference |
| --- | --- | --- |
| Is it \\| or -? | a \\| b |  |
| q |  | r |"""


def test_answers_are_a_table_and_the_loss_a_number(config, monkeypatch):
    shown = {}
    for name in ("wandb", "trackio"):
        fake = Wandb()
        fake.Table = lambda columns, data: [columns, data]
        monkeypatch.setitem(sys.modules, name, fake)
        backend = Backend(name, config, 0)
        backend.write(for_backends(EVALUATED))
        backend.close()
        [(step, row)] = fake.rows
        assert step == 4
        shown[name] = row.pop("samples")
        assert row == {"step": 4, "held_out_loss": 1.5, "eval_seconds": 0.1}
    assert shown["wandb"] == [["question", "answer", "reference"], [["Is it | or\n-?", "a | b", None], ["q", None, "r"]]]
    assert shown["trackio"] == TABLE


def test_tensorboard_gets_the_answers_and_again_the_evaluation_that_a_resume_keeps(config, monkeypatch, tmp_path):
    told = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        add_scalar = add_text = lambda self, *given: told.append(given)

        def close(self):
            told.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(EVALUATED) + "\n")
    config = config.model_copy(update={"log": LogConfig(backends=["tensorboard"])})
    with Metrics(config, 4, 9, Console(quiet=True), lambda row: True) as metrics:
        assert metrics.evaluated
    scalars = [("step", 4, 4), ("held_out_loss", 1.5, 4), ("eval_seconds", 0.1, 4)]
    assert told == [(str(tmp_path / "run" / "tensorboard"), 4), *scalars, ("samples", TABLE, 4), "closed"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_resumes_is_the_same_run(name, config, monkeypatch):
    first, again = (through(monkeypatch, config, Wandb(), step, name).inits[0] for step in (0, 7))
    assert again == first
    assert again["resume"] == "allow"


def test_a_run_begun_anew_is_the_same_with_the_same_config_alone(config, monkeypatch, settings):
    first = through(monkeypatch, config, Wandb()).inits[0]["id"]
    assert through(monkeypatch, config, Wandb()).inits[0]["id"] == first
    other = check_config(settings(optim={"lr": 0.5}, log={"backends": ["wandb"]}))
    assert through(monkeypatch, other, Wandb()).inits[0]["id"] != first


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_backend_that_raises_is_said_once(place, config, monkeypatch, capsys):
    through(monkeypatch, config, Wandb(breaks=place))
    said = capsys.readouterr().err
    assert said.count("log.backends: wandb failed") == 1
    assert "ConnectionError: [/red] is unreachable" in said


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_backend_that_hangs_holds_nothing(place, config, monkeypatch, capsys):
    monkeypatch.setattr(backends, "OPENING_SECONDS", 0.1)
    monkeypatch.setattr(backends, "CLOSING_SECONDS", 0.1)
    began = time.monotonic()
    through(monkeypatch, config, Wandb(hangs=place))
    assert time.monotonic() - began < 5
    assert "log.backends: wandb failed and is off from here on (it did not finish within" in capsys.readouterr().err


def test_a_backend_that_cannot_be_imported_is_said_and_one_that_is_not_there_is_refused(config, monkeypatch, tmp_path, capsys):
    (tmp_path / "wandb.py").write_text("raise AttributeError('protobuf is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    check_backends(config.log)
    Backend("wandb", config, 0).close()
    assert "protobuf is too old" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.backends: wandb is not installed; run pip install"):
        check_backends(LogConfig(backends=["wandb"]))


def test_rows_that_nobody_takes_are_not_kept_for_ever(config, monkeypatch, capsys):
    monkeypatch.setattr(backends, "OPENING_SECONDS", 0.1)
    monkeypatch.setattr(backends, "_ROWS_WAITING", 3)
    monkeypatch.setitem(sys.modules, "wandb", Wandb(hangs="init"))
    backend = Backend("wandb", config, 0)
    for step in range(5):
        backend.write({"step": step})
    backend.close()
    assert "3 rows wait for it" in capsys.readouterr().err
