"""A run that is killed, and started again by the same command, is bit for bit the unbroken one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from parallel_runs import start
from rich.console import Console
from safetensors.torch import load_file

from fastllava.config import check_config
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics

FASTLLAVA = Path(sys.executable).with_name("fastllava")
KILLS, STEPS = 10, 150
NUMBERS = ("step", "loss", "grad_norm", "lr", "samples", "tokens", "supervised_tokens")


def quiet():
    return Console(file=open(os.devnull, "w"))


def numbers(output_dir):
    return [{key: row[key] for key in NUMBERS} for row in read_metrics(output_dir)]


def same_files(one, other, name):
    first, second = load_file(one / name), load_file(other / name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_killed_at_ten_random_points(settings, tmp_path):
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    base = {"max_steps": STEPS, "checkpoint_steps": 7, "loss_norm": "llava"}
    values = settings("finetune", output_dir=str(broken), data={"workers": 1}, train=base)
    points = sorted(random.Random(os.environ.get("KILL_SEED", "0")).sample(range(3, STEPS - 10), KILLS))
    for point in points:
        process = start(values, tmp_path / "said")
        while len(read_metrics(broken)) <= point:
            assert process.is_alive(), (tmp_path / "said").read_text()
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was still training"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    done = subprocess.run([FASTLLAVA, "train", path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming before step" in done.stdout

    run(check_config({**values, "output_dir": str(unbroken)}), quiet())
    assert numbers(broken) == numbers(unbroken)
    assert len(numbers(broken)) == STEPS
    assert same_files(broken, unbroken, "model.safetensors")


def test_stage_1_resumes_too(settings, tmp_path, monkeypatch):
    import fastllava.train.loop as module

    values = settings("pretrain", train={"max_steps": 12, "checkpoint_steps": 5})
    honest, calls = module.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(module, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(check_config(values), quiet())
    monkeypatch.setattr(module, "train_step", honest)
    run(check_config(values), quiet())
    run(check_config({**values, "output_dir": str(tmp_path / "whole")}), quiet())
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    assert same_files(tmp_path / "run", tmp_path / "whole", "mm_projector.safetensors")


def test_a_change_of_packing_resumes_and_is_said(settings, tmp_path, capsys):
    values = settings("pretrain", train={"max_steps": 4, "checkpoint_steps": 2})
    run(check_config(values), quiet())
    (tmp_path / "run" / "run_summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    values["train"] |= {"micro_batch_tokens": 400, "tf32": True}
    run(check_config(values), Console(width=200))
    said = capsys.readouterr().out
    assert "rounding only: train.micro_batch_tokens was 150 and is now 400" in said
    assert "rounding only: train.tf32 was False and is now True" in said
    assert "resuming before step 2" in said


def test_checkpoints_by_time(settings, tmp_path):
    run(check_config(settings(train={"max_steps": 3, "checkpoint_minutes": 1e-9})), quiet())
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_full_disk_stops_no_training(settings, tmp_path, monkeypatch, capsys):
    import fastllava.train.state.checkpoint as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_shards", full)
    run(check_config(settings(train={"max_steps": 4, "checkpoint_steps": 1})), Console(width=200))
    assert "could not be written" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run_summary.json").read_text())["status"] == "complete"
    assert not list((tmp_path / "run").glob("*checkpoint*"))
