"""`fastllava mix` on the command line, and what docs/mix.md says of it."""

import io
import json
import re
import subprocess
import sys

import pytest
import yaml
from annotation_files import whole_mix
from rich.console import Console

from fastllava import cli
from fastllava.mix import progress
from fastllava.mix.build import build
from fastllava.mix.config import check_mix
from fastllava.mix.progress import Working
from fastllava.mix.reasons import BAD, BY_RULE
from fastllava.mix.sources import FORMATS


@pytest.fixture
def fastllava(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastllava", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_it_builds_says_what_and_compares(world, fastllava, tmp_path):
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(whole_mix(world)))
    code, said = fastllava("mix", "mix.yaml", "--out", "built")
    assert code == 0, said
    assert "vg: 1 records from 14 annotations; left out: 2 per_image" in said
    assert re.search(r"^all +17 ", said, re.MULTILINE)
    assert "17 records in built" in said
    code, said = fastllava("mix", "mix.yaml", "--out", "built", "--compare", "built/mix.json")
    assert code == 0, said
    assert "holds this mix already" in said
    assert "equal" in said
    assert set(json.loads((tmp_path / "built" / "compare.json").read_text())["kinds"]) >= {"GQA", "A-OKVQA"}
    code, said = fastllava("mix", "--compare", "built/mix.json")
    assert code == 0, said
    assert "72,140" in said
    code, said = fastllava("mix", "mix.yaml", "--out", "built")
    assert code == 0, "compare.json beside the mix does no harm"


def test_a_bar_on_a_terminal_and_lines_elsewhere(world, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SAY_EVERY", 0.0)
    for terminal in (True, False):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=terminal, width=100)
        build(check_mix(whole_mix(world)), tmp_path / str(terminal), Working(console))
        said = shown.getvalue()
        assert ("━" in said) is terminal
        assert ("  mix.json: 100 %" in said) is not terminal
        assert "gqa: 2 records from 3 annotations" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to do; give a mix such as mix665k.yaml with --out DIR, or --compare FILE alone"),
        (["mix.yaml"], "--out: is missing; write --out DIR"),
        (["--out", "x", "--compare", "y"], "--out: nothing is built without a mix"),
        (["none.yaml", "--out", "x"], "none.yaml: cannot be read"),
        (["mix665k", "--out", "x"], "sources.gqa.files.questions: there is no file playground/data/gqa/train_balanced_questions.json"),
        (["--compare", "none.json"], "none.json cannot be read"),
    ],
)
def test_a_mistake_is_one_line(fastllava, words, said):
    code, printed = fastllava("mix", *words)
    assert code == 2
    assert said in printed
    assert "Traceback" not in printed


def test_help_and_mistakes_need_no_torch():
    program = """
import sys
from fastllava.cli import main
sys.argv = ["fastllava", "mix"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "AssertionError" not in done.stderr


def test_the_example_of_the_docs(repo, fastllava, tmp_path):
    page = (repo / "docs" / "mix.md").read_text(encoding="utf-8")
    blocks = {kind: re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("yaml", "csv", "json")}
    for name, kind in (("mix.yaml", "yaml"), ("questions.csv", "csv"), ("boxes.jsonl", "json")):
        found = blocks[kind]
        assert found is not None
        (tmp_path / name).write_text(found[1])
    (tmp_path / "pictures" / "street").mkdir(parents=True)
    for name in ("a.png", "street/b.png"):
        (tmp_path / "pictures" / name).touch()
    code, said = fastllava("mix", "mix.yaml", "--out", "out")
    assert code == 0, said
    records = json.loads((tmp_path / "out" / "mix.json").read_text())
    assert sorted(record["image"] for record in records) == ["a.png", "street/b.png"]
    asked = next(record for record in records if record["image"] == "a.png")["conversations"]
    assert [turn["value"] for turn in asked] == [
        "<image>\nWhat is it?\nAnswer the question using a single word or phrase.",
        "A bus",
        "Which colour?",
        "red",
    ]


def test_the_docs_name_every_reason_and_format(repo):
    page = (repo / "docs" / "mix.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page[page.index("## What is dropped") :], re.MULTILINE))
    assert {reason: what.replace("`<image>`", "<image>") for reason, what in told.items()} == {**BAD, **BY_RULE}
    for name in FORMATS:
        assert f"`{name}`" in page, name
