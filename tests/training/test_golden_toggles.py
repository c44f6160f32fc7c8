"""Every toggle at every value that runs here leaves the training as the original's: its recorded runs come out the same."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from golden_trace import check_equal, config_of

from fastllava import train
from fastllava.config import check_config
from fastllava.metrics import read_metrics
from fastllava.model.ops import Ops, choose_ops
from fastllava_kernels import rooms, tuning
from fastllava_kernels.launch import INTERPRETED
from fastllava_kernels.room import why_not

CPU, FP32 = torch.device("cpu"), torch.float32


def rounds(lists: dict[str, list[str]]) -> list[dict[str, str]]:
    """A choice a round in which each room's k-th implementation has its turn; a room with fewer repeats its last."""
    return [{room: names[min(k, len(names) - 1)] for room, names in lists.items()} for k in range(max(map(len, lists.values())))]


RUNNABLE = {name: [i for i in room.implementations if why_not(room, i, CPU, FP32) is None] for name, room in rooms().items()}
INTERPRETABLE = {name: [i for i, one in room.implementations.items() if one.interpretable] for name, room in rooms().items()}
INTERPRETABLE = {name: names for name, names in INTERPRETABLE.items() if names}


interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off; on a GPU the kernels run as they are")


def test_every_implementation_that_runs_here_has_a_turn() -> None:
    for lists in (RUNNABLE, INTERPRETABLE):
        for name, names in lists.items():
            assert {choice[name] for choice in rounds(lists)} == set(names)


@pytest.mark.parametrize("choice", rounds(RUNNABLE), ids=lambda choice: "-".join(dict.fromkeys(choice.values())))
@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_kernels(name, choice, shared, tmp_path) -> None:
    config = check_config({**config_of(name, shared, tmp_path / name), "kernels": choice})
    done = train.run(config)
    check_equal(name, shared, tmp_path / name)
    assert {room: use["implementation"] for room, use in done.summary["kernels"].items()}.items() <= choice.items()


@pytest.fixture
def training_tables():
    """The configurations of an H100 in place of the interpreter's, whose small blocks would take minutes."""
    with ExitStack() as stack:
        for kernel, _, _, chosen in tuning.flatten(tuning.read_table("sm_90")):
            stack.enter_context(tuning.override(kernel, chosen))
        yield


def run_interpreted(config: dict, monkeypatch, **choice: str) -> dict:
    """Train with Triton kernels on CPU tensors, which a config could not ask for; the kernels of the summary."""
    ops = Ops(choose_ops({}, CPU, FP32).chosen | choice)
    monkeypatch.setattr(train, "choose_ops", lambda *_, **__: ops)
    return train.run(check_config(config)).summary["kernels"]


# Rope has a program a row, so a step of it takes the interpreter ten seconds: apart, and for one step.
WITHOUT_ROPE = {name: "triton" for name, names in INTERPRETABLE.items() if name != "rope" and "triton" in names}


@interpreted
def test_triton_kernels_train_the_projector(shared, tmp_path, monkeypatch, training_tables) -> None:
    used = run_interpreted(config_of("pretrain", shared, tmp_path / "pretrain"), monkeypatch, **WITHOUT_ROPE)
    check_equal("pretrain", shared, tmp_path / "pretrain")
    assert {room for room, use in used.items() if use["implementation"] == "triton"} == WITHOUT_ROPE.keys() & used.keys()


@interpreted
@pytest.mark.parametrize(
    ("name", "choice"),
    [("finetune", WITHOUT_ROPE), *(("pretrain", {"rope": implementation}) for implementation in INTERPRETABLE["rope"])],
    ids=lambda value: value if isinstance(value, str) else "-".join(dict.fromkeys(value.values())),
)
def test_triton_kernels_give_the_first_gradient(name, choice, shared, tmp_path, monkeypatch, training_tables) -> None:
    config = config_of(name, shared, tmp_path / name)
    records = Path(config["data"]["records"])
    records.write_text(json.dumps(json.loads(records.read_text())[: config["train"]["global_batch"]]))
    run_interpreted(config, monkeypatch, **choice)
    (row,) = read_metrics(tmp_path / name / "run")
    step = json.loads((shared / "golden" / "trace" / f"trace_{name}.json").read_text())["steps"][0]
    assert row["loss"] == pytest.approx(step["loss"], rel=1e-5)
    assert row["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("name", "mode"), [("finetune", "layer"), ("pretrain", "step")])
def test_compiled_by_inductor(name, mode, shared, tmp_path) -> None:
    train.run(check_config(config_of(name, shared, tmp_path / name, compile=mode)))
    check_equal(name, shared, tmp_path / name)
