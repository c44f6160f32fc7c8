"""The file of metrics outlives a full disk, and so does the run."""

import errno
import os

import pytest
from rich.console import Console

from fastllava.config import check_config
from fastllava.train import run
from fastllava.train.metrics import lines
from fastllava.train.metrics.lines import Lines
from fastllava.train.metrics.log import read_metrics


def full(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """The writes from the `first` to before the `last` find no room, the first of them after half a line."""
    honest, writes = os.write, []

    def write(file: int, data: bytes) -> int:
        writes.append(1)
        if len(writes) == first:
            return honest(file, data[: len(data) // 2])
        if first < len(writes) < last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return honest(file, data)

    monkeypatch.setattr(lines.os, "write", write)


def test_lines_wait_until_there_is_room_again(tmp_path, monkeypatch):
    said = []
    full(monkeypatch, 3, 6)
    file = Lines(tmp_path / "f", said.append)
    for i in range(8):
        file.write(f"line {i}")
    file.close()
    assert (tmp_path / "f").read_text() == "".join(f"line {i}\n" for i in range(8))
    assert len(said) == 2
    assert "No space left on device" in said[0]
    assert "written again" in said[1]


def test_what_is_lacking_at_the_end_is_said(tmp_path, monkeypatch):
    said = []
    full(monkeypatch, 3, 10**6)
    file = Lines(tmp_path / "f", said.append)
    for i in range(8):
        file.write(f"line {i}")
    file.close()
    assert "lacks its last 6 lines" in said[-1]


@pytest.mark.parametrize("last", [5, 10**6])
def test_a_run_whose_metrics_find_no_room_completes(last, settings, tmp_path, monkeypatch, capsys):
    full(monkeypatch, 3, last)
    run(check_config(settings(train={"max_steps": 8})), Console(width=1000))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(8 if last == 5 else 2))
    assert "wait in memory, the run goes on" in capsys.readouterr().out
    assert (tmp_path / "run" / "mm_projector.safetensors").is_file()
