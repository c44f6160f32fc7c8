"""Every toggle of a room does something: there is a config under which it changes what code runs in a training step."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import fastllava_kernels
from fastllava.config import Config, check_config
from fastllava.config.toggles import kernel_toggles
from fastllava.data.loader import steps
from fastllava.data.plan import Plan
from fastllava.model.execution import Execution
from fastllava.model.ops import choose_ops
from fastllava.model.weights import load_llava
from fastllava.optim import FiniteGuard, build_optimizer
from fastllava.train import run, train_step
from fastllava.train.dataset import prepare_data
from fastllava.train.metrics.flops import Accounting
from fastllava.train.stages import prepare_stage
from fastllava_kernels import rooms
from fastllava_kernels.room import SEPARATE, Room, why_not

CPU = torch.device("cpu")
KERNELS = Path(fastllava_kernels.__file__).parent


def batches_of(config: Config):
    """The micro-batches of the first step."""
    _, spec, prepared = prepare_data(config, lambda line: None)
    plan = Plan(prepared, config.data, config.train, Accounting.of(config).cost())
    return next(steps(plan, 0, prepared, spec, config.data, pin=False))[1]


def code_run(config: Config, batches) -> set[tuple[str, str]]:
    """(file, name) of every function of the kernels' package that a training step calls."""
    model = load_llava(config.model, Execution.of(config, choose_ops(config.kernels, CPU, torch.float32)), 0, config.lora)
    trained = prepare_stage(model, config)
    optimizer = build_optimizer(trained.items(), config.optim)
    guard, found = FiniteGuard(optimizer, CPU), set()

    def look(frame, event, _) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(KERNELS):
            found.add((str(path.relative_to(KERNELS)), frame.f_code.co_qualname))

    # To compile would take longer than all else together.
    with torch.compiler.set_stance("force_eager"):
        sys.setprofile(look)
        try:
            train_step(model, optimizer, guard, batches, CPU, None)
        finally:
            sys.setprofile(None)
    return found


def runnable(room: Room) -> list[str]:
    """The values of its toggle that run here."""
    values = [value for value in room.values if value != "auto"]
    return [value for value in values if value == SEPARATE or why_not(room, value, CPU, torch.float32) is None]


def config_with(given: dict[str, Any], *words: str) -> Config:
    """The config with these words, such as `lora.rank=8`, in place of what was given."""
    for word in words:
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        given.setdefault(section, {})[name] = yaml.safe_load(value)
    return check_config(given)


@pytest.fixture(scope="module")
def needs() -> dict[str, tuple[str, ...]]:
    """The words that a run needs for each room's toggle to matter."""
    return {toggle.key.removeprefix("kernels."): toggle.needs for toggle in kernel_toggles(CPU)}


@pytest.mark.parametrize("room", rooms())
def test_each_value_of_a_room_runs_other_code(room, needs, settings):
    configs = {value: config_with(settings("finetune"), *needs[room], f"kernels.{room}={value}") for value in runnable(rooms()[room])}
    batches = batches_of(next(iter(configs.values())))
    ran = {value: code_run(config, batches) for value, config in configs.items()}
    # Whatever else they share, each runs the room that it is about, and no two run the same.
    assert len(ran) >= 2
    assert len({frozenset(code) for code in ran.values()}) == len(ran)
    own = {value: {file for file, _ in code if file.startswith(f"{room}/")} for value, code in ran.items()}
    assert all(own[value] for value in ran if value != SEPARATE)


@pytest.mark.parametrize(
    ("kernels", "model", "idle"),
    [
        ({"splice": "torch"}, {}, ["splice"]),
        ({"splice": "torch", "projector_splice": "separate"}, {}, []),
        ({"splice": "torch", "projector_splice": "separate"}, {"projector_type": "mlp_downsample"}, ["projector_splice"]),
        ({"swiglu": "reference"}, {}, []),
        ("reference", {}, []),
    ],
)
def test_a_toggle_that_changes_nothing_is_said(settings, kernels, model, idle):
    said = io.StringIO()
    run(check_config(settings("finetune", kernels=kernels, model=model, train={"max_steps": 1})), Console(file=said, width=1000))
    notes = [line for line in said.getvalue().splitlines() if "changes nothing" in line]
    assert [line.split("=")[0].removeprefix("note: kernels.") for line in notes] == idle


def test_separate_runs_the_parts_and_not_the_whole(settings):
    config = check_config(settings("finetune", kernels={"projector_splice": "separate"}))
    folders = {Path(file).parts[0] for file, _ in code_run(config, batches_of(config))}
    assert {"projector_mlp", "splice"} <= folders
    assert "projector_splice" not in folders
