"""A run's folder made by hand around a prepared set that is a real one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import ATTACK, NASTY, SPEC, Made, eval_row, step_row, talk
from PIL import Image

from fastllava.config import as_written, check_config
from fastllava.data.prepared import prepare
from fastllava.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def _prepared_run(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("report")
    (root / "images").mkdir()
    Image.new("RGB", (400, 200), (200, 30, 30)).save(root / "images" / "good.png")
    records = [talk(f"r{i}", f"What is in picture {i}?", "a red dog", "good.png") for i in range(20)]
    records += [talk(f"nasty {NASTY}", NASTY.replace("\x00", ""), NASTY.replace("\x00", "")), talk("long", "Go on.", "word " * 3000)]
    records += [talk("gone", "q", "a", "not there.png"), talk(f"bad <b>{ATTACK}", "q", "a", "../out.png"), {"id": "empty"}]
    (root / "records.json").write_text(json.dumps(records))
    (root / "llm").mkdir()
    (root / "llm" / "tokenizer.model").write_bytes((golden / "tokenizer" / "tokenizer.model").read_bytes())
    config = check_config(
        {
            "stage": "finetune",
            "output_dir": str(root / "run"),
            "model": {"llm": str(root / "llm"), "vision_tower": "openai/clip-vit-large-patch14-336"},
            "data": {
                "records": str(root / "records.json"),
                "images": str(root / "images"),
                "prepared_dir": str(root / "prepared"),
                "max_quarantined_share": 1.0,
                "workers": 0,
            },
            "optim": {"lr": 3e-5},
            "train": {"global_batch": 4, "max_steps": 40, "tf32": True},
        }
    )
    prepared = prepare(config.data, Tokenizer.load(root / "llm"), SPEC, report=lambda line: None)
    written = as_written(config)
    summary = {
        "status": "complete",
        "config": written,
        "prepared": str(prepared.folder),
        "prepared_digest": prepared.digest,
        "planned_steps": 40,
        "steps": 40,
        "processes": 2,
        "goodput": 0.9,
        "wall_seconds": 7320.0,
        "notes": [],
        "kernels": {"rope": {"implementation": "triton"}},
        "versions": {"torch": "2.12", "device": "NVIDIA H100"},
        "commit": "0123abc",
    }
    return Made(root / "run", written, summary)


def _complete(prepared: Made, folder: Path) -> Made:
    made = replace(prepared, folder=folder)
    made.folder.mkdir()
    rows = [step_row(step) for step in range(40)]
    rows[:0], rows[20:20] = [eval_row(0, 3.5, "")], [eval_row(20, 1.5, NASTY)]
    return made.write("run_config.json", made.config).write("metrics.jsonl", rows).write("run_summary.json", made.summary)


@pytest.fixture(scope="session")
def run_made_once(_prepared_run: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A complete run of 40 steps, for tests that change nothing in it."""
    return _complete(_prepared_run, tmp_path_factory.mktemp("once") / "run")


@pytest.fixture
def make_run(_prepared_run: Made, tmp_path: Path) -> Callable[[], Made]:
    """Makes a complete run of 40 steps, whose files a test may change; all are of one prepared set."""
    return lambda: _complete(_prepared_run, tmp_path / "run")
