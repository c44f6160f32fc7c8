"""`fastllava score`: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastllava.cli import app
from fastllava.errors import UserError
from fastllava.evaluate.benchmark import JudgedBenchmark
from fastllava.evaluate.benchmarks import BENCHMARKS

SEED = {
    "questions": [
        {"question_id": "1", "data_id": "a", "data_type": "image", "question_type_id": 1, "answer": "A"},
        {"question_id": "2", "data_id": "b", "data_type": "image", "question_type_id": 1, "answer": "B"},
    ],
    "question_type": {"Scene Understanding": 1},
}
ANSWERS = [{"question_id": 1, "prompt": "?", "text": "A"}, {"question_id": 2, "prompt": "?", "text": "A"}]


@pytest.fixture
def files(tmp_path):
    data = tmp_path / "seed_bench"
    data.mkdir()
    (data / "SEED-Bench.json").write_text(json.dumps(SEED))
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    return data, answers


def score(*arguments):
    return CliRunner().invoke(app, ["score", *map(str, arguments)], catch_exceptions=False)


def test_it_prints_figures_beside_the_published_ones_and_writes_them(files, tmp_path):
    data, answers = files
    result = score("seed_bench", "--data", data, "--answers", answers, "--json", tmp_path / "score.json")
    assert result.exit_code == 0
    assert "58.6" in result.stdout
    assert "50.00" in result.stdout
    written = json.loads((tmp_path / "score.json").read_text())
    assert written["benchmark"] == "seed_bench"
    assert written["figures"]["total"] == written["figures"]["image"] == 50.0
    assert [row["score"] for row in written["questions"]] == [1.0, 0.0]


def test_it_writes_what_a_server_takes(files, tmp_path):
    data, answers = files
    result = score("seed_bench", "--data", data, "--answers", answers, "--upload", tmp_path / "up")
    assert result.exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "up" / "seed_bench.jsonl").read_text().splitlines()]
    assert rows == [{"question_id": "1", "prediction": "A"}, {"question_id": "2", "prediction": "A"}]


def test_the_folder_of_json_is_made(files, tmp_path):
    data, answers = files
    assert score("seed_bench", "--data", data, "--answers", answers, "--json", tmp_path / "a" / "b" / "score.json").exit_code == 0
    assert (tmp_path / "a" / "b" / "score.json").is_file()


def test_a_place_that_cannot_be_written_is_named_before_anything_is_scored(files, tmp_path):
    _, answers = files
    for place in (answers / "score.json", tmp_path):
        with pytest.raises(UserError, match=r"--json: .* cannot be written \(.*\); give another place"):
            score("seed_bench", "--data", tmp_path / "nowhere", "--answers", answers, "--json", place)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seedbench"], "no benchmark 'seedbench'; write one of vqav2, "),
        (["seed_bench", "--replies", "x"], "seed_bench: rules score it, and no judge"),
        (["pope", "--upload", "up"], "pope: .* is not there|pope: there is no server"),
    ],
)
def test_what_it_refuses(arguments, words, files):
    data, answers = files
    with pytest.raises(UserError, match=words):
        score(*arguments, "--data", data, "--answers", answers)


def test_the_table_of_the_docs_is_that_of_the_benchmarks():
    page = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
    rows = []
    for one in BENCHMARKS.values():
        by = "a judge" if isinstance(one, JudgedBenchmark) else "its server" if one.server else "fastllava"
        figures = f"{one.published['7b']:.1f} | {one.published['13b']:.1f}"
        rows.append(f"| `{one.name}` | `{one.folder}` | {one.max_new_tokens} | `{one.headline}` | {figures} | {by} |")
    assert "\n".join(rows) in page.read_text(encoding="utf-8")
