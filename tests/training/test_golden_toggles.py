"""Every toggle at every value that runs here leaves the training as the original's: its recorded runs come out the same."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from golden_trace import check_equal, config_of

from fastllava.config import check_config
from fastllava.model.ops import Ops, choose_ops
from fastllava.train import loop as train
from fastllava.train import machine
from fastllava.train.metrics.log import read_metrics
from fastllava_kernels import rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import tuning
from fastllava_kernels.room import SEPARATE, why_not

CPU, FP32 = torch.device("cpu"), torch.float32


def rounds(lists: dict[str, list[str]]) -> list[dict[str, str]]:
    """A choice a round in which each room's k-th implementation has its turn; a room with fewer repeats its last."""
    return [{room: names[min(k, len(names) - 1)] for room, names in lists.items()} for k in range(max(map(len, lists.values())))]


RUNNABLE = {name: [i for i in room.implementations if why_not(room, i, CPU, FP32) is None] for name, room in rooms().items()}
for room in rooms().values():
    # As often as its parts have implementations, so that each of those has its turn in a step.
    RUNNABLE[room.name] = [SEPARATE] * max((len(RUNNABLE[part]) for part in room.parts), default=0) + RUNNABLE[room.name]
INTERPRETABLE = {name: [i for i, one in room.implementations.items() if one.interpretable] for name, room in rooms().items()}
INTERPRETABLE = {name: names for name, names in INTERPRETABLE.items() if names}

interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off; on a GPU the kernels run as they are")


def in_words(value: str | dict[str, str]) -> str:
    """A parameter as it stands in the test's id."""
    return value if isinstance(value, str) else "-".join(dict.fromkeys(value.values()))


def implementations(done: train.RunResult) -> dict[str, str]:
    """The implementation of each room that the run used."""
    return {room: use["implementation"] for room, use in done.summary["kernels"].items()}


@pytest.mark.parametrize("choice", rounds(RUNNABLE), ids=in_words)
@pytest.mark.parametrize("name", ["pretrain", "finetune", "lora"])
def test_kernels(name, choice, golden, tmp_path) -> None:
    config = check_config({**config_of(name, golden, tmp_path / name), "kernels": choice})
    done = train.run(config)
    check_equal(name, golden, tmp_path / name)
    assert implementations(done).items() <= choice.items()


@pytest.fixture
def training_tables():
    """The configurations of an H100 in place of the interpreter's, whose small blocks would take minutes."""
    with ExitStack() as stack:
        for kernel, _, _, chosen in tuning.configurations("sm_90"):
            stack.enter_context(tuning.override(kernel, chosen))
        yield


def run_interpreted(config: dict, monkeypatch, **choice: str) -> dict[str, str]:
    """Train with Triton kernels on CPU tensors, which a config could not ask for; the implementation of each room in use."""
    ops = Ops(choose_ops({}, CPU, FP32).chosen | choice)
    monkeypatch.setattr(machine, "choose_ops", lambda *_, **__: ops)
    return implementations(train.run(check_config(config)))


# Rope has a program a row, so a step of it takes the interpreter ten seconds: apart, and for one step.
WITHOUT_ROPE = rounds({name: names for name, names in INTERPRETABLE.items() if name != "rope"})
ROPE = [{"rope": name} for name in INTERPRETABLE["rope"]]
# Others' kernel of rope is theirs to hold.
FIRST_STEPS = [
    *(pytest.param("finetune", choice) for choice in WITHOUT_ROPE),
    *(pytest.param("pretrain", choice, marks=[] if choice == {"rope": "triton"} else pytest.mark.exhaustive) for choice in ROPE),
]


@interpreted
@pytest.mark.parametrize("choice", WITHOUT_ROPE, ids=in_words)
def test_triton_kernels_train_the_projector(choice, golden, tmp_path, monkeypatch, training_tables) -> None:
    used = run_interpreted(config_of("pretrain", golden, tmp_path / "pretrain"), monkeypatch, **choice)
    check_equal("pretrain", golden, tmp_path / "pretrain")
    assert used.items() >= {room: choice[room] for room in choice.keys() & used.keys()}.items()


@interpreted
@pytest.mark.parametrize(("name", "choice"), FIRST_STEPS, ids=in_words)
def test_triton_kernels_give_the_first_loss_and_gradient_norm(name, choice, golden, tmp_path, monkeypatch, training_tables) -> None:
    config = config_of(name, golden, tmp_path / name)
    records = Path(config["data"]["records"])
    records.write_text(json.dumps(json.loads(records.read_text())[: config["train"]["global_batch"]]))
    used = run_interpreted(config, monkeypatch, **choice)
    assert used.items() >= {room: choice[room] for room in choice.keys() & used.keys()}.items()
    (row,) = read_metrics(tmp_path / name / "run")
    step = json.loads((golden / "trace" / f"trace_{name}.json").read_text())["steps"][0]
    assert row["loss"] == pytest.approx(step["loss"], rel=1e-5)
    assert row["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("name", "mode"), [("finetune", "layer"), pytest.param("pretrain", "step", marks=pytest.mark.exhaustive)])
def test_compiled_by_inductor(name, mode, golden, tmp_path) -> None:
    train.run(check_config(config_of(name, golden, tmp_path / name, compile=mode)))
    check_equal(name, golden, tmp_path / name)


def test_every_implementation_that_runs_here_has_a_turn() -> None:
    for lists, choices in ((RUNNABLE, rounds(RUNNABLE)), (INTERPRETABLE, WITHOUT_ROPE + ROPE)):
        turns = {(room, name) for choice in choices for room, name in choice.items()}
        assert turns == {(room, name) for room, names in lists.items() for name in names}
