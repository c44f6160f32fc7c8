"""Several processes against one: the same losses, gradient norms and weights, whatever befalls one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml
from parallel_runs import METHOD, launch, stop_after
from rich.console import Console
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastllava.config import check_config
from fastllava.data.balance import Cost
from fastllava.data.plan import Plan
from fastllava.data.prepared import PreparedSet
from fastllava.distributed.processes import Processes
from fastllava.distributed.sharding import Sharding, shard
from fastllava.errors import UserError
from fastllava.model.execution import Execution
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics
from fastllava.train.stages import prepare_stage
from fastllava.train.state import checkpoint

SAME = ("step", "lr", "samples", "tokens", "supervised_tokens")

# What is run in one process, by name: its difference from stage 2 in fp32 over 4 steps of 4 samples, one of them of texts only.
RUNS = {
    "stage 2": {},
    "clipped": {"train": {"loss_norm": "llava"}, "optim": {"max_grad_norm": 1.0, "weight_decay": 0.1}},
    # One process may have nothing but texts in a micro-batch.
    "stage 1": {"stage": "pretrain", "data": {"records": "chats.json", "template": "v1"}},
    # Of 32 records the second step has one.
    "one sample": {"train": {"global_batch": 31, "max_steps": None}},
    "stage 1 in bf16": {"stage": "pretrain", "train": {"precision": "bf16"}},
    "stage 2 in bf16": {"train": {"precision": "bf16"}},
    "fewer tokens an image": {"model": {"projector_type": "mlp_downsample"}},
    "resumed": {"train": {"max_steps": 8, "checkpoint_steps": 3}},
    "adapters": {"lora": {"rank": 4, "dropout": 0.1}, "optim": {"projector_lr": 1e-3}},
    "adapters resumed": {"lora": {"rank": 4, "dropout": 0.1}, "train": {"max_steps": 8, "checkpoint_steps": 3}},
}
# How several processes run them.
PAIRS = {
    "as it is": ("clipped", {}),
    "kept gathered, computed again, compiled": (
        "stage 2",
        {"train": {"recompute": "selective", "compile": "layer"}, "parallel": {"reshard": False}},
    ),
    "reduced once a step": ("clipped", {"parallel": {"reduce": "step"}, "kernels": {"projector_splice": "separate"}}),
    "frozen whole": ("stage 1", {"parallel": {"frozen": "replicate"}}),
    "fewer tokens an image": ("fewer tokens an image", {}),
    "frozen sharded, computed again": ("stage 1", {"parallel": {"frozen": "shard"}, "train": {"recompute": "norms"}}),
    "stage 1 in bf16": ("stage 1 in bf16", {"parallel": {"frozen": "shard"}}),
    "stage 2 in bf16": ("stage 2 in bf16", {}),
    "adapters, the rest whole": ("adapters", {"parallel": {"frozen": "replicate"}}),
    "adapters, the rest sharded, computed again": ("adapters", {"parallel": {"frozen": "shard"}, "train": {"recompute": "selective"}}),
}
FOURS = {
    "replicas": ("clipped", {"parallel": {"replicas": 2}, "train": {"micro_batch_tokens": 1}}),
    "fewer samples than processes": ("one sample", {}),
}
MISHAPS = {"picture": (3, "it is gone"), "loss": (3, "step 3: loss nan, gradient norm nan")}


NOTHING_LOST = 1e-5
"""Relative, of losses, gradient norms and the norm of each weight's difference."""


def values_of(settings, world, out, *changes):
    sections = {}
    for change in changes:
        for section, values in change.items():
            sections[section] = {**sections.get(section, {}), **values} if isinstance(values, dict) else values
    values = settings(sections.pop("stage", "finetune"), output_dir=str(out), **sections)
    values["train"] = {"max_steps": 4, "device": "cpu", "seed": 1, **values["train"]}
    # AdamW turns the rounding of a gradient near nothing into a step of size lr.
    values["optim"] = {"warmup_ratio": 0.0, **values["optim"], "lr": 2e-3}
    values["data"]["records"] = str(world / values["data"]["records"])
    values["data"]["prepared_dir"] = str(world / "prepared")
    return values


@pytest.fixture(scope="session")
def alone(world, tmp_path_factory):
    """`alone(name, settings)`: the folder of that run in one process, made once."""
    made = {}

    def folder(name, settings):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("alone")
            with open(os.devnull, "w") as nowhere:
                run(check_config(values_of(settings, world, made[name], RUNS[name])), Console(file=nowhere))
        return made[name]

    return folder


def check_equal(ours, theirs, tolerance=NOTHING_LOST):
    rows, others = read_metrics(ours), read_metrics(theirs)
    assert [[row[key] for key in SAME] for row in rows] == [[row[key] for key in SAME] for row in others] != []
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in others], rel=tolerance), (ours, key)
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert sorted(path.name for path in ours.glob("*.safetensors")) == names != []
    for name in names:
        found, expected = load_file(ours / name), load_file(theirs / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            error = torch.linalg.vector_norm(found[key].double() - tensor.double())
            assert error <= tolerance * torch.linalg.vector_norm(tensor.double()), (ours, key)


@pytest.mark.parametrize(("count", "cases"), [(2, PAIRS), (4, FOURS)])
def test_equal_to_one_process(count, cases, settings, world, alone, tmp_path):
    jobs = [(values_of(settings, world, tmp_path / case, RUNS[name], change), None) for case, (name, change) in cases.items()]
    launch(count, jobs, tmp_path / "said")
    for case, (name, _) in cases.items():
        check_equal(tmp_path / case, alone(name, settings), 1e-2 if "bf16" in name else NOTHING_LOST)


def test_one_of_the_steps_is_of_texts_only(settings, alone):
    summary = json.loads((alone("stage 2", settings) / "run_summary.json").read_text())
    prepared, config = PreparedSet.open(Path(summary["prepared"])), check_config(summary["config"])
    plan = Plan(prepared, config.data, config.train, Cost(1, 0, 0, 0))
    assert 0 in [prepared.n_images[plan.step(index).samples].sum() for index in range(4)]


@pytest.mark.parametrize("name", [pytest.param("resumed", marks=pytest.mark.exhaustive), "adapters resumed"])
def test_goes_on_in_another_number_of_processes(settings, world, alone, tmp_path, monkeypatch, name):
    values = values_of(settings, world, tmp_path / "run", RUNS[name])
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(check_config(values), Console(quiet=True)).stopped_by is signal.SIGTERM
    for count, taken, stop in ((2, 4, 2), (4, 5, 1)):
        launch(count, [(values, stop)], tmp_path / f"said.{count}")
        assert len(read_metrics(tmp_path / "run")) == taken
        said = (tmp_path / f"said.{count}.0.0").read_text()
        assert "resuming before step" in said
        assert f"stopped by SIGTERM before step {taken} of 8; the same command goes on" in said
    run(check_config(values), Console(quiet=True))
    check_equal(tmp_path / "run", alone(name, settings))


def test_a_mishap_of_one_process_is_told_once_and_nothing_is_lost(settings, world, alone, tmp_path):
    values = {name: values_of(settings, world, tmp_path / name, {"train": {"micro_batch_tokens": 10**6}}) for name in MISHAPS}
    launch(2, [(values[name], name) for name in MISHAPS] + [(values[name], None) for name in MISHAPS], tmp_path / "said")
    for number, (step, message) in enumerate(MISHAPS.values()):
        told = [(tmp_path / f"said.{number}.{rank}").read_text().splitlines()[-1] for rank in range(2)]
        assert all(message in line for line in told)
        assert sorted(line.partition(":")[0] for line in told) == ["ToldElsewhere", "UserError"]
        assert f"resuming before step {step}" in (tmp_path / f"said.{number + len(MISHAPS)}.0").read_text()
    for name in MISHAPS:
        check_equal(tmp_path / name, alone("stage 2", settings))


def test_a_disk_that_fills_up_under_one_process_stops_no_training(settings, world, tmp_path):
    values = values_of(settings, world, tmp_path / "run", {"train": {"checkpoint_steps": 1}})
    launch(2, [(values, "disk")], tmp_path / "said")
    said = (tmp_path / "said.0.0").read_text()
    assert "checkpoint before step 3 could not be written" in said
    assert "No space left on device" in said
    assert "complete: loss" in said
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_torchrun_passes_a_stop_on_to_all(settings, world, tmp_path):
    values = values_of(settings, world, tmp_path / "run", {"train": {"max_steps": 10_000}, "data": {"workers": 1}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    programs = Path(sys.executable).parent
    command = [programs / "torchrun", "--no-python", "--nproc-per-node", "2", programs / "fastllava", "train", path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(read_metrics(tmp_path / "run")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    rows = read_metrics(tmp_path / "run")
    assert f"stopped by SIGTERM before step {len(rows)} of 10000; the same command goes on from there" in out, err
    assert out.count("stopped by") == 1
    assert checkpoint.newest(tmp_path / "run").step == len(rows)


@pytest.mark.exhaustive
def test_torchrun_starts_again_what_was_killed(settings, world, tmp_path):
    values = values_of(settings, world, tmp_path / "run", {"train": {"max_steps": 60, "checkpoint_steps": 5}, "data": {"workers": 1}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    programs = Path(sys.executable).parent
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "1"]
    command = [programs / "torchrun", "--no-python", "--nproc-per-node", "2", *rendezvous, programs / "fastllava", "train", path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(read_metrics(tmp_path / "run")) < 8:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "resuming before step" in out
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(60))


@pytest.mark.parametrize(("frozen", "sharded"), [("shard", True), ("replicate", False)])
def test_one_graph_of_everything_is_for_layers_that_are_whole(world, frozen, sharded):
    # In a process of its own: what torch keeps of a fake group would reach the processes that later tests fork from this one.
    torch.multiprocessing.start_processes(_place, (world, frozen, sharded), nprocs=1, start_method=METHOD)


def _place(_, world, frozen, sharded):
    config = check_config(
        {
            "stage": "pretrain",
            "output_dir": "o",
            "model": {"llm": str(world / "llm"), "vision_tower": str(world / "clip")},
            "data": {"records": "r"},
            "train": {"compile": "step", "precision": "fp32"},
            "parallel": {"frozen": frozen},
        }
    )
    model = load_llava(config.model, Execution.of(config, reference_ops()), 0)
    sharding = Sharding(Processes(world=2), config.parallel)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with (
            pytest.raises(UserError, match=r"^train\.compile: 'step' makes one graph.*write train\.compile=layer$")
            if sharded
            else nullcontext()
        ):
            prepare_stage(model, config, place=lambda model: shard(model, sharding, torch.device("cpu")))
    finally:
        dist.destroy_process_group()
