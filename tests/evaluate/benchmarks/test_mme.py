"""MME: the official verdicts, points and tables, and pairs that find each other by the picture's name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmarks import benchmark
from fastllava.evaluate.benchmarks.mme import COGNITION, PERCEPTION, verdict

MME = benchmark("mme")
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def asked(tmp_path: Path) -> list[dict]:
    """An MME of two pictures a category in tmp_path, in both layouts and with one and two blanks; its questions, as their right answers."""
    rows = []
    for category in (*PERCEPTION, *COGNITION):
        folder = tmp_path / "MME_Benchmark_release_version" / category
        if category in ("artwork", "scene"):
            (folder / "images").mkdir(parents=True)
            folder /= "questions_answers_YN"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("a", "b"):
            (folder / f"{name}.txt").write_text(
                f"Is it {name}? Please answer yes or no.\tYes\nIs it not {name}?  Please answer yes or no.\tNo\n"
            )
            for question, answer in ((f"Is it {name}?", "Yes"), (f"Is it not {name}?", "No")):
                rows.append({"question_id": f"{category}/{name}.png", "prompt": question + SHORT, "text": answer})
    return rows


def test_equals_the_official_code(official: Path, tmp_path: Path) -> None:
    """Every verdict, category and table of the recorded run."""
    data = official / "scorers" / "mme"
    expected = json.loads((data / "expected.json").read_text())
    answers = MME.read(data / "answers.jsonl")
    found = MME.score(data, answers)
    for name in ("perception", "cognition"):
        assert found.figures[name] == pytest.approx(expected[name], rel=1e-9)
    for name, points in expected["categories"].items():
        assert found.figures[f"category.{name}"] == pytest.approx(points, rel=1e-9)
    assert [{"question_id": row["question_id"], "verdict": row["verdict"]} for row in found.questions] == expected["per_answer"]
    assert [warning.split(" (")[0] for warning in found.warnings] == ["the official rule takes 49 answers"]
    paths = MME.upload(data, answers, tmp_path)
    assert {path.stem: path.read_text() for path in paths} == expected["tables"]
    again = MME.score(data, MME.read(tmp_path))
    assert again.figures == found.figures


SAID = {
    "yes": ("Yes", "YES.", "Eyes", " Yes", "yes it is"),
    "no": ("No", "Not sure", "None", "Know", "no\nyes", "Nyet no"[5:]),
    "other": ("", "I don't know", "The answer is yes", "Maybe yes", "Y", "不"),
}


@pytest.mark.parametrize(("text", "says"), [(text, says) for says, texts in SAID.items() for text in texts])
def test_verdict_follows_the_official_rule(text: str, says: str) -> None:
    """The first four characters, in lower case."""
    assert verdict(text) == says


def test_points(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """200 a category: a wrong answer of four takes a quarter of the first hundred and half of the second."""
    asked[0] = {**asked[0], "text": "No"}
    found = MME.score(tmp_path, MME.read(write_lines("answers.jsonl", asked)))
    assert (found.figures["perception"], found.figures["cognition"]) == (1925, 800)
    assert found.figures["category.existence"] == 125
    assert not found.warnings


def test_answers_that_the_rule_takes_for_something_else(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """The figure is the official one; the warning says what it is by what the answers say."""
    asked[0] = {**asked[0], "text": "The answer is yes"}
    found = MME.score(tmp_path, MME.read(write_lines("answers.jsonl", asked)))
    assert found.figures["perception"] == 1925
    assert found.warnings == [
        "the official rule takes 1 answer (existence/a.png: 'The answer is yes') for something else than they say: "
        "perception is 1925.0000 by the rule, and 2000.0000 by what they say"
    ]


def test_pairs_go_by_picture(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """Answers in another order have the same points, and a warning says what their places would give."""
    asked[0] = {**asked[0], "text": "No"}
    asked[3] = {**asked[3], "text": "Yes"}
    found = MME.score(tmp_path, MME.read(write_lines("answers.jsonl", [asked[0], asked[3], asked[1], asked[2], *asked[4:]])))
    assert found.figures["category.existence"] == 50
    (warning,) = found.warnings
    assert "here perception 1850.0000 and cognition 800.0000" in warning
    assert "the official code, for which each two lines are a picture: perception 1900.0000" in warning


def test_missing_and_double_answers(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """Missing ones are wrong, the last of two counts, and the warning says what the official tables would give."""
    found = MME.score(tmp_path, MME.read(write_lines("a.jsonl", asked[1:])))
    assert found.figures["category.existence"] == 125
    assert "without an answer, and wrong here: 1 question (existence/a.txt)" in found.warnings[0]
    assert "AssertionError" in found.warnings[0]
    assert found.questions[-1]["line"] is None
    found = MME.score(tmp_path, MME.read(write_lines("b.jsonl", asked[2:])))
    assert found.figures["perception"] == 1900
    assert "the official code, for which each two lines are a picture: perception 2000.0000" in found.warnings[0]
    found = MME.score(tmp_path, MME.read(write_lines("c.jsonl", [{**asked[0], "text": "No"}, *asked])))
    assert found.figures["perception"] == 2000
    assert "more than two" in found.warnings[0]
    with pytest.raises(UserError, match="answers nothing of existence"):
        MME.score(tmp_path, MME.read(write_lines("d.jsonl", asked[4:])))
    with pytest.raises(UserError, match="no label for 'Is it c"):
        MME.score(tmp_path, MME.read(write_lines("e.jsonl", [*asked, {**asked[0], "prompt": "Is it c?" + SHORT}])))


def test_a_line_break_in_an_answer(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """It is scored by its start, named as what breaks the official tables, and a blank in those of ours."""
    asked[0] = {**asked[0], "text": "Yes\nit\tis"}
    answers = MME.read(write_lines("answers.jsonl", asked))
    found = MME.score(tmp_path, answers)
    assert found.figures["perception"] == 2000
    assert "ValueError" in found.warnings[0]
    MME.upload(tmp_path, answers, tmp_path / "out")
    first = (tmp_path / "out" / "existence.txt").read_text().splitlines()[0]
    assert first == "a.txt\tIs it a? Please answer yes or no.\tYes\tYes it is"
    assert MME.score(tmp_path, MME.read(tmp_path / "out")).figures == found.figures


def test_labels_from_the_tables_of_the_tool(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """Without the release, eval_tool/Your_Results has the labels; tables of answers have them themselves; else they are asked for."""
    answers = MME.read(write_lines("answers.jsonl", asked))
    MME.upload(tmp_path, answers, tmp_path / "tables")
    (tmp_path / "MME_Benchmark_release_version").rename(tmp_path / "elsewhere")
    assert MME.score(tmp_path, MME.read(tmp_path / "tables")).figures["perception"] == 2000
    with pytest.raises(UserError, match="MME_Benchmark_release_version is not there"):
        MME.score(tmp_path, answers)
    template = tmp_path / "eval_tool" / "Your_Results"
    template.mkdir(parents=True)
    for table in (tmp_path / "tables").glob("*.txt"):
        lines = [line.rsplit("\t", 1)[0].replace(".txt\t", ".png\t") for line in table.read_text().splitlines()]
        (template / table.name).write_text("\n".join(lines) + "\n")
    assert MME.score(tmp_path, answers).figures["perception"] == 2000


def test_labels_that_are_damaged(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """A label file that cannot be one is named."""
    answers = MME.read(write_lines("answers.jsonl", asked))
    file = tmp_path / "MME_Benchmark_release_version" / "color" / "a.txt"
    whole = file.read_text()
    for text, said in (
        (whole.replace("\t", " "), "line 1 has 1 cells"),
        (whole.replace("\tYes", "\tJa"), "neither yes nor no"),
        (whole + "Third? Please answer yes or no.\tNo\n", "not two questions about color/a"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            MME.score(tmp_path, answers)
