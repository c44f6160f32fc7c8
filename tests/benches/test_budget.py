"""`fastllava bench budget`: its tables, their limits, and the committed ones."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benches import budget, cli
from benches.budget import Budget
from fastllava.planner.layer import Layer
from fastllava.planner.simulate import Dispatched
from fastllava_kernels import rooms
from fastllava_kernels._tuning import tuning

LAYER = Layer(
    {("forward", "aten::mm"): Dispatched(7, 3e9), ("rest", "aten::zeros"): Dispatched(1, 1e9)},
    {"forward": 2e9, "backward": 4e9},
    {("forward", "aten"): 40, ("forward", "fastllava"): 5, ("backward", "aten"): 50, ("rest", "aten"): 99},
)


def traffic(room: str, run: str, moved: int, floor: float = 1000.0) -> dict[str, Any]:
    return {
        "room": room,
        "shape": "7b",
        "run": run,
        "kernel": f"{room}.{run}",
        "loaded": moved - 100,
        "stored": 100,
        "once": 990,
        "floor": floor,
    }


def made(**changed: int) -> Budget:
    moved = {"swiglu": 1000, "splice": 1050, "projector_mlp": 5000} | changed
    return Budget({("finetune", "none"): LAYER}, [traffic(room, "forward", bytes) for room, bytes in moved.items()])


def test_a_room_over_its_limit_is_named() -> None:
    assert made().problems() == []
    assert made(swiglu=1010).problems() == ["swiglu (7b, forward): 1.010 of its floor, 1.0 at most"]
    assert made(splice=1100).problems() == ["splice (7b, forward): 1.100 of its floor, 1.06 at most"]


def test_a_layer_that_dispatches_more_than_it_may_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(budget.DISPATCHED, "finetune", 94)
    assert made().problems() == ["finetune: 95 ops dispatched for a layer, 94 at most"]
    assert Budget({("finetune", "full"): LAYER}, []).problems() == [], "what is computed again is listed only"


def test_kernels_of_a_pass_count_together() -> None:
    both = Budget({}, [traffic("swiglu", "forward", 600), traffic("swiglu", "forward", 600)])
    assert both.problems() == ["swiglu (7b, forward): 1.200 of its floor, 1.0 at most"]


def test_what_the_tables_say() -> None:
    table = made().render()
    assert "| finetune | none | forward | 45 | 7 | 3.000 | 2.000 | 1.50 |" in table
    assert "| forward | `aten::mm` | 7 | 3.000 |" in table
    assert "aten::zeros" not in table, "what is no part of forward or backward"
    assert "| splice.forward | 7b | forward | 950 | 100 | 1.061 |" in table
    assert "| splice | 7b | forward | 1050 | 1000 | 1.050 | 1.06 |" in table


def test_changed_lines_and_another_pytorch() -> None:
    before, after = made().render(), made(projector_mlp=6000).render()
    assert budget.differences(before, before) == []
    assert len(budget.differences(before, after)) == 4
    other = before.replace(budget._version(), "PyTorch 0.1")
    assert budget.differences(other.replace("| 3.000 |", "| 9.000 |"), before) == [], "its ops are its own"
    assert len(budget.differences(other, after)) == 4


@pytest.mark.parametrize(
    ("changed", "code", "said"), [({}, 0, ""), ({"splice": 1040}, 1, "out of date"), ({"swiglu": 1500}, 1, "of its floor")]
)
def test_the_command_compares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, int], code: int, said: str) -> None:
    monkeypatch.setattr(budget, "count", made)
    committed = tmp_path / "budget.md"
    assert CliRunner().invoke(cli.app, ["budget", "--write", str(committed)]).exit_code == 0
    monkeypatch.setattr(budget, "count", lambda: made(**changed))
    result = CliRunner().invoke(cli.app, ["budget", "--check", str(committed)])
    assert result.exit_code == code
    assert said in result.output


def test_the_committed_tables_have_every_room_and_every_kernel(repo: Path) -> None:
    """make exhaustive counts them again; this only sees that none was left out."""
    committed = (repo / "kernels/budget.md").read_text(encoding="utf-8")
    for name, room in rooms().items():
        assert ("triton" in room.implementations) == (f"\n| {name} |" in committed), f"{name}: {budget.COMMAND}"
    # Rooms share functions: one of those that launch it is enough.
    listed = {kernel.function for name, kernel in tuning.kernels().items() if f"\n| {name} |" in committed}
    assert listed == {kernel.function for kernel in tuning.kernels().values()}


def test_a_layer_dispatches_no_more_than_it_may() -> None:
    """What the host dispatches goes with the code alone, not with sizes."""
    assert Budget(budget.layers("tiny", ["none"]), []).problems() == []


@pytest.mark.exhaustive
def test_the_committed_tables_are_what_is_counted(repo: Path) -> None:
    now = budget.count()
    assert now.problems() == []
    assert budget.differences((repo / "kernels/budget.md").read_text(encoding="utf-8"), now.render()) == [], budget.COMMAND
