"""Several processes against one: the same losses, gradient norms and weights, and runs that go on in another number of them."""

import os

import pytest
import torch
from parallel_runs import launch, run_jobs
from rich.console import Console
from safetensors.torch import load_file

from fastllava.config import check_config
from fastllava.metrics import read_metrics
from fastllava.train import run

SAME = ("step", "lr", "samples", "tokens", "supervised_tokens")

# What is run in one process, by name: its difference from stage 2 in fp32 over 4 steps of 4 samples.
RUNS = {
    "stage 2": {},
    "mean of means, clipped": {"train": {"loss_norm": "llava"}, "optim": {"max_grad_norm": 1.0, "weight_decay": 0.1}},
    "texts": {"data": {"records": "texts.json"}},
    "stage 1": {"stage": "pretrain"},
    # One process may have nothing but texts in a micro-batch.
    "stage 1 with texts": {"stage": "pretrain", "data": {"records": "chats.json", "template": "v1"}},
    # Of 32 records the second step has one.
    "a step of one sample": {"train": {"global_batch": 31, "max_steps": None}},
    "stage 1 in bf16": {"stage": "pretrain", "train": {"precision": "bf16"}},
    "stage 2 in bf16": {"train": {"precision": "bf16"}},
}
# How several processes run each of them.
PAIRS = [
    ("stage 2", {}),
    ("stage 2", {"train": {"recompute": "full"}, "parallel": {"reshard": False}}),
    ("mean of means, clipped", {"parallel": {"reduce": "step"}}),
    ("texts", {}),
    ("stage 1", {"parallel": {"frozen": "replicate"}}),
    ("stage 1", {"parallel": {"frozen": "shard"}, "train": {"recompute": "full"}}),
    ("stage 1 with texts", {"parallel": {"frozen": "shard"}}),
    ("stage 1 in bf16", {"parallel": {"frozen": "shard"}}),
    ("stage 2 in bf16", {}),
]
FOURS = [
    ("mean of means, clipped", {"parallel": {"replicas": 2}}),
    ("stage 2", {"parallel": {"replicas": 4}, "train": {"micro_batch_tokens": 1}}),
    ("a step of one sample", {}),
]


def quiet():
    return Console(file=open(os.devnull, "w"))


def values_of(settings, world, out, *changes):
    sections = {}
    for change in changes:
        for section, values in change.items():
            sections[section] = {**sections.get(section, {}), **values} if isinstance(values, dict) else values
    values = settings(sections.pop("stage", "finetune"), output_dir=str(out), **sections)
    values["train"] = {"max_steps": 4, "device": "cpu", **values["train"]}
    values["optim"] = {"warmup_ratio": 0.0, **values["optim"]}
    values["data"]["records"] = str(world / values["data"]["records"])
    values["data"]["prepared_dir"] = str(world / "prepared")
    return values


@pytest.fixture(scope="session")
def alone(world, tmp_path_factory):
    """`alone(name, values)`: the folder of that run in one process, made once."""
    made = {}

    def folder(name, values):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("alone")
            run(check_config({**values, "output_dir": str(made[name])}), quiet())
        return made[name]

    return folder


def check_equal(ours, theirs, tolerance):
    rows, others = read_metrics(ours), read_metrics(theirs)
    assert [[row[key] for key in SAME] for row in rows] == [[row[key] for key in SAME] for row in others] != []
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in others], rel=tolerance), key
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert sorted(path.name for path in ours.glob("*.safetensors")) == names != []
    for name in names:
        found, expected = load_file(ours / name), load_file(theirs / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            error = torch.linalg.vector_norm(found[key].double() - tensor.double())
            assert error <= tolerance * torch.linalg.vector_norm(tensor.double()), key


@pytest.mark.parametrize(("count", "cases"), [(2, PAIRS), (4, FOURS)])
def test_equal_to_one_process(count, cases, settings, world, alone, tmp_path):
    jobs = [(values_of(settings, world, tmp_path / str(n), RUNS[name], change), None) for n, (name, change) in enumerate(cases)]
    launch(count, run_jobs, jobs, tmp_path / "said")
    for number, (name, _) in enumerate(cases):
        expected = alone(name, values_of(settings, world, tmp_path / "alone", RUNS[name]))
        check_equal(tmp_path / str(number), expected, 1e-2 if "bf16" in name else 1e-5)
