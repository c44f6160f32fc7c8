"""The original's recorded training runs: the config that repeats one, and what must come out the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllava.train.metrics.log import read_metrics

RUNS = {
    "pretrain": {
        "stage": "pretrain",
        "records": "pretrain",
        "model": {"projector": "pretrain_projector_init.safetensors"},
        "optim": {"lr": 1e-2},
        "train": {"reference_micro_batch": 8},
        "result": "stage1/mm_projector.safetensors",
    },
    "finetune": {
        "stage": "finetune",
        "records": "finetune",
        "model": {"projector": "stage1/mm_projector.bin"},
        "optim": {"lr": 2e-3},
        "train": {"reference_micro_batch": 8},
        "result": "stage2/model.safetensors",
    },
    "finetune_accum": {
        "stage": "finetune",
        "records": "finetune",
        "model": {"projector": "stage1/mm_projector.bin"},
        "optim": {"lr": 2e-3, "projector_lr": 1e-4, "weight_decay": 0.1},
        "train": {"reference_micro_batch": 4},
        "result": "stage2_accum/model.safetensors",
    },
    "lora": {
        "stage": "finetune",
        "records": "finetune",
        "model": {},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0},
        "optim": {"lr": 2e-3, "projector_lr": 2e-4},
        "train": {"reference_micro_batch": 8},
        "result": "adapter/adapter_model.safetensors",
    },
}


def place_of(name: str, golden: Path) -> Path:
    """The folder with what was recorded of a run: its own for the run with adapters."""
    return golden / ("lora" if "lora" in RUNS[name] else "trace")


def steps_of(name: str, golden: Path) -> list[dict[str, Any]]:
    """The recorded steps."""
    return json.loads((place_of(name, golden) / f"trace_{name}.json").read_text())["steps"]


def write_beginning(lora: Path, folder: Path) -> Path:
    """Write the adapters and the projector that the recorded run began with as a folder that a run can go on from; `folder`."""
    folder.mkdir()
    shutil.copyfile(lora / "adapter" / "adapter_config.json", folder / "adapter_config.json")
    tensors = load_file(lora / "init_lora.safetensors")
    adapters = {name.replace(".default", ""): tensor for name, tensor in tensors.items() if ".lora_" in name}
    save_file(adapters, folder / "adapter_model.safetensors")
    torch.save({name: tensor for name, tensor in tensors.items() if ".lora_" not in name}, folder / "non_lora_trainables.bin")
    return folder


def config_of(name: str, golden: Path, out: Path, **train: Any) -> dict[str, Any]:
    """The config of one recorded run, its records in the order of the trace."""
    run_, trace = RUNS[name], golden / "trace"
    steps = steps_of(name, golden)
    records = {record["id"]: record for record in json.loads((trace / f"{run_['records']}.json").read_text())}
    out.mkdir(parents=True)
    (out / "records.json").write_text(json.dumps([records[i] for step in steps for i in step["ids"]]))
    begins = {key: str(trace / path) for key, path in run_["model"].items()}
    if "lora" in run_:
        begins["adapter"] = str(write_beginning(golden / "lora", out / "begins"))
    return {
        "stage": run_["stage"],
        "output_dir": str(out / "run"),
        "model": {
            "llm": str(trace / "llm"),
            "vision_tower": str(trace / "clip"),
            "tokenizer": str(golden / "tokenizer" / "tokenizer.model"),
            **begins,
        },
        **({"lora": run_["lora"]} if "lora" in run_ else {}),
        "data": {"records": str(out / "records.json"), "images": str(trace / "images"), "shuffle": False, "legacy": False, "workers": 0},
        "optim": {"max_grad_norm": 1.0, **run_["optim"]},
        "train": {"global_batch": 8, "precision": "fp32", "loss_norm": "llava", **run_["train"], **train},
    }


def check_equal(name: str, golden: Path, out: Path, norm_tolerance: float = 1e-4) -> None:
    """Compare a run with its trace: loss within 1e-5, gradient norm 1e-4, learning rate exactly, final tensors 1e-4 in norm."""
    steps = steps_of(name, golden)
    rows = read_metrics(out / "run")
    assert [row["step"] for row in rows] == [step["step"] for step in steps]
    for row, step in zip(rows, steps, strict=True):
        assert row["loss"] == pytest.approx(step["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(step["grad_norm"], rel=norm_tolerance)
        # Of the run with adapters every group's was recorded, the projector's too.
        assert row["lr"] == (step["lr"] if isinstance(step["lr"], float) else step["lr"][0])
        assert row["samples"] == len(step["ids"])
        assert row["supervised_tokens"] == sum(micro["supervised_tokens"] for micro in step["micro_batches"])
    expected = load_file(place_of(name, golden) / RUNS[name]["result"])
    found = load_file(out / "run" / Path(RUNS[name]["result"]).name)
    if "lora" in RUNS[name]:
        beside = "non_lora_trainables.bin"
        expected |= torch.load(golden / "lora" / "adapter" / beside, weights_only=True)
        found |= torch.load(out / "run" / beside, weights_only=True)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        error = (found[key].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-30)
        assert error <= 1e-4, f"{key}: {error}"
