"""`fastllava certify`: its files, its exit codes, and what it says of a user's mistakes."""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fastllava import cli
from fastllava.certify import variants as module
from fastllava.certify.judge import LOSS
from fastllava.certify.variants import VARIANTS
from fastllava.model.ops import reference_ops


@pytest.fixture
def write(settings, tmp_path):
    """`write(stage, **sections)`: a config file."""

    def make(*args: Any, **sections: Any) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings(*args, **sections)))
        return str(path)

    return make


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["certify", *words])


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_text_and_json_agree_and_nothing_else_is_written(write, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoint-3").mkdir(parents=True)
    (out / "checkpoint-3" / "state.json").write_text("{}")
    (out / "metrics.jsonl").write_text('{"step": 0}\n')
    before = contents(out)
    result = run(write(), "--samples", "3", "--steps", "1", "train.seed=7")
    assert result.exit_code == 0, result.output
    after = contents(out)
    assert {name: after.pop(name) for name in before} == before
    assert sorted(after) == ["certificate.json", "certificate.txt"]
    page, found = (out / "certificate.txt").read_text(), json.loads((out / "certificate.json").read_text())
    assert page.strip() in result.output
    assert page.splitlines()[1] == page.splitlines()[-1] == found["verdict"]
    assert found["holds"] is True
    assert found["config"]["train"]["seed"] == 7
    (step,) = found["steps"]
    assert len(step["ids"]) == step["samples"] == 3
    assert all(name in page for name in step["ids"])
    assert found["model"]["weights_sha256"][:16] in page
    assert found["data"]["prepared_digest"][:16] in page
    row = re.search(r"^0 +loss +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", page, re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(step["figures"]["truth"][LOSS]["norm"], rel=1e-5)
    for variant, printed in zip(("configured", "packed", "single", "plain"), row.groups()[1:], strict=True):
        assert float(printed) == pytest.approx(step["figures"][variant][LOSS]["error"], rel=0.05, abs=1e-12)
    worst = {each["name"]: each for each in sorted(found["judged"], key=lambda each: each["used"])}
    used = re.search(r"^lm_head .* (\d+)% ", page, re.MULTILINE)
    assert used is not None
    assert int(used[1]) == round(100 * worst["llm.lm_head.weight"]["used"])
    assert set(step["seconds"]) == set(VARIANTS)


def test_a_run_that_differs_exits_with_1_and_leaves_the_page(write, tmp_path, monkeypatch):
    honest = module.rebuilt

    def nudged(model: Any, execution: Any) -> Any:
        other = honest(model, execution)
        if execution.ops.chosen != reference_ops().chosen:
            other.llm.model.norm.eps = 0.1
        return other

    monkeypatch.setattr(module, "rebuilt", nudged)
    result = run(write(), "--samples", "3", "--steps", "1", "--out", str(tmp_path / "elsewhere"))
    assert result.exit_code == 1, result.output
    page = (tmp_path / "elsewhere" / "certificate.txt").read_text()
    assert page.splitlines()[1].startswith("FAILS in whole, kernels: ")
    assert json.loads((tmp_path / "elsewhere" / "certificate.json").read_text())["holds"] is False
    assert not (tmp_path / "run").exists()


MISTAKES = {
    "nothing there": ("pretrain", [], {"model": {"llm": "nowhere"}}, r"model\.llm: nowhere/config\.json does not exist"),
    "wrong key": ("pretrain", ["train.precisions=fp32"], {}, r"train\.precisions: .*did you mean train\.precision"),
    "no kernel": ("pretrain", ["kernels.swiglu=cuda"], {}, r"kernels\.swiglu: .*is no implementation of it"),
    "no projector": ("finetune", [], {"model": {"projector": None}}, r"model\.projector: is missing"),
    "nothing trains": ("pretrain", [], {"model": {"projector_type": "identity"}}, r"model\.projector_type: identity has no weights, so"),
    "out is a file": ("pretrain", ["--out", __file__], {}, r"--out: .* cannot be made \(File exists\); give a folder that can"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_2(case, write, capsys, monkeypatch):
    stage, words, sections, expected = MISTAKES[case]
    monkeypatch.setattr(sys, "argv", ["fastllava", "certify", write(stage, **sections), *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert re.match(f"error: {expected}", line), line


def test_torchrun_is_refused_by_one_process_a_machine(write, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(sys, "argv", ["fastllava", "certify", write()])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        said += capsys.readouterr().err.splitlines()
    assert said == ["error: certify: it runs in one process, and torchrun starts several; start it without torchrun"]
