"""The generated tables: they are what the committed results give, and say what results say."""

import json
from pathlib import Path

import pytest

from benches import report
from benches.lib.results import RESULTS
from benches.lib.world import REPO
from fastllava.errors import UserError


@pytest.mark.parametrize("name", report.TABLES)
def test_the_committed_table_is_what_the_committed_results_give(name) -> None:
    texts = [path.read_text(encoding="utf-8") for pattern in report.TEXTS for path in REPO.glob(pattern)]
    with_marks = [text for text in texts if f"<!-- {name}: begin -->" in text]
    assert with_marks
    for text in with_marks:
        assert text == report.between_marks(text, name, report.TABLES[name](RESULTS)), "write it anew: fastllava bench report"


def test_writes_between_the_markers_only(tmp_path: Path) -> None:
    tables = {name: lambda results, name=name: f"{name} of {results.name}" for name in ("one", "two")}
    (tmp_path / "docs").mkdir()
    text = "".join(f"before\n<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nafter\n" for name in ("one", "two"))
    (tmp_path / "docs" / "a.md").write_text(text)
    assert report.write(tmp_path, tmp_path / "results", tables) == [tmp_path / "docs" / "a.md"]
    assert (tmp_path / "docs" / "a.md").read_text() == text.replace("old", "one of results", 1).replace("old", "two of results", 1)
    (tmp_path / "docs" / "a.md").write_text("none")
    with pytest.raises(UserError, match=r"no text has the marks <!-- one: begin --> and <!-- one: end -->"):
        report.write(tmp_path, tmp_path / "results", tables)
    assert (tmp_path / "docs" / "a.md").read_text() == "none"


def test_plans_say_what_was_foreseen_or_that_nothing_fits(tmp_path: Path) -> None:
    stage = {
        "stage": "pretrain",
        "gpu": "a100-80g",
        "world": 8,
        "parameters": {"trained": 20_000_000, "frozen": 7_040_000_000},
        "samples": 2560,
        "steps": 10,
        "usable_bytes": 74 * 2**30,
        "limit": "products",
    }
    chosen = {"recompute": "none", "micro_batch_tokens": 16384, "peak_memory_bytes": 60 * 2**30, "step_seconds": 2.5, "mfu": 0.61}
    fits = stage | {"chosen": chosen, "hours": 1.5, "gpu_hours": 12.0}
    nothing = stage | {"stage": "finetune", "chosen": None, "hours": None, "gpu_hours": None, "limit": "memory: nothing fits"}
    (tmp_path / "plan_a.json").write_text(json.dumps([fits, fits]))
    (tmp_path / "plan_b.json").write_text(json.dumps([fits, nothing]))
    lines = report.plan_table(tmp_path).splitlines()
    assert lines[2] == "| 7B on 8 x a100-80g | pretrain | 2,560 | 10 | none | 16,384 | 60 of 74 | 2.50 | 61% | 1.5 | products |"
    assert lines[4] == "| 7B on 8 x a100-80g | **both** | | | | | | | | **3.0** | 24 GPU-hours |"
    assert lines[6] == "| 7B on 8 x a100-80g | finetune | 2,560 | 10 | - | - | - | - | - | - | memory: nothing fits |"
    assert len(lines) == 7
