"""POPE: the official verdicts and figures, and answers that find their labels by id."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmarks import benchmark
from fastllava.evaluate.benchmarks.pope import verdict

POPE = benchmark("pope")
LABELS = {"random": ["yes", "no", "yes"], "popular": ["no", "yes"], "adversarial": ["no", "yes"]}


@pytest.fixture
def asked(tmp_path: Path, write_lines: Callable) -> list[dict]:
    """A small POPE in tmp_path; its questions."""
    questions = []
    for category, labels in LABELS.items():
        rows = [{"question_id": n, "image": f"{n}.jpg", "text": f"Is there a {category}?", "label": x} for n, x in enumerate(labels, 1)]
        write_lines(f"coco/coco_pope_{category}.json", rows)
        for row in rows:
            text = row["text"].replace(" a ", " an ") + "\nAnswer the question using a single word or phrase."
            questions.append({"question_id": len(questions) + 100, "image": row["image"], "text": text, "category": category})
    write_lines("llava_pope_test.jsonl", questions)
    return questions


def _answers(asked: list[dict], texts: list[str]) -> list[dict]:
    return [{"question_id": row["question_id"], "prompt": row["text"], "text": text} for row, text in zip(asked, texts, strict=True)]


RIGHT = ["Yes", "No", "Yes", "No", "Yes", "No", "No"]


def test_equals_the_official_code(official: Path) -> None:
    """Every count, figure and verdict of the recorded run."""
    data = official / "scorers" / "pope"
    expected = json.loads((data / "expected.json").read_text())
    found = POPE.score(data, POPE.read(data / "answers.jsonl"))
    for category, figures in expected["categories"].items():
        for name in ("tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1", "yes_ratio"):
            assert found.figures[f"{category}.{name}"] == pytest.approx(figures[name], rel=1e-9)
    assert found.figures["f1_mean"] == pytest.approx(expected["mean_f1_of_categories"], rel=1e-9)
    assert {str(row["question_id"]): row["verdict"] for row in found.questions} == {str(k): v for k, v in expected["per_question"].items()}
    assert [warning.split(" (")[0] for warning in found.warnings] == ["the official rule takes 96 answers"]


NO = ("No", "no", "It is not", "No, it is", "No.", "Yes, but it is not clear", "no. Yes")
YES = ("NO", "NO.", "Nope", "None", "Not at all", "There isn't", '"No"', "no!", "no\n", "", "Well. No", "Yes", "yes")


@pytest.mark.parametrize(("text", "says"), [*((text, "no") for text in NO), *((text, "yes") for text in YES)])
def test_verdict_follows_the_official_rule(text: str, says: str) -> None:
    """Words are cut at single blanks, in the first sentence, and exactly three of them mean no."""
    assert verdict(text) == says


def test_figures_of_a_small_one(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """Counts by hand: one miss among the adversarial ones leaves two F1 of 1 and no right yes in the third."""
    found = POPE.score(tmp_path, POPE.read(write_lines("answers.jsonl", _answers(asked, RIGHT))))
    assert found.figures["random.tp"] == 2
    assert found.figures["f1_mean"] == pytest.approx(2 / 3)
    assert (found.figures["adversarial.precision"], found.figures["adversarial.f1"]) == (0, 0)
    assert "ZeroDivisionError" in found.warnings[0]
    assert found.questions[-1] == {
        "question_id": 106, "line": 6, "category": "adversarial", "label": "yes", "verdict": "no", "score": 0.0
    }  # fmt: skip


def test_all_answers_no(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """Where the official code divides by zero there is a figure, and a word about it."""
    found = POPE.score(tmp_path, POPE.read(write_lines("answers.jsonl", _answers(asked, ["No"] * 7))))
    assert found.figures["f1_mean"] == 0
    assert found.figures["random.yes_ratio"] == 0
    assert len(found.warnings) == 3


def test_answers_that_the_rule_takes_for_something_else(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """The verdict is the official one; the warning says what F1 is by what the answers say, where one that says neither is wrong."""
    texts = ["Yes", "NO", "", "No", "Yes", "No", "Yes"]
    found = POPE.score(tmp_path, POPE.read(write_lines("answers.jsonl", _answers(asked, texts))))
    assert found.figures["f1_mean"] == pytest.approx((0.8 + 1 + 1) / 3)
    assert found.warnings == [
        "the official rule takes 2 answers (101: 'NO', 102: '') for something else than they say: "
        "f1_mean is 0.9333 by the rule, and 0.8889 by what they say"
    ]


def test_order_does_not_matter(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """Answers out of order have the figures of those in order, and a warning says what their places would give."""
    right = _answers(asked, ["Yes", "No", "Yes", "No", "Yes", "No", "Yes"])
    turned = [right[1], right[0], *right[2:]]
    found = POPE.score(tmp_path, POPE.read(write_lines("answers.jsonl", turned)))
    assert found.figures["f1_mean"] == 1
    # By place: one of two yes is right, and one of two said yes.
    assert found.warnings == [
        "the answers are not in the order of the questions: here f1_mean is 1.0000, the official code gives f1_mean 0.8333"
    ]


def test_missing_strange_and_double_answers(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """Answers that do not go with the questions are refused, and the last of two counts."""
    right = _answers(asked, ["Yes", "No", "Yes", "No", "Yes", "No", "Yes"])
    with pytest.raises(UserError, match=r"no answer to 1 of 7 questions \(101\).*gives f1_mean 0.8889"):
        POPE.score(tmp_path, POPE.read(write_lines("a.jsonl", right[:1] + right[2:])))
    with pytest.raises(UserError, match=r"not in .*\(7\)"):
        POPE.score(tmp_path, POPE.read(write_lines("b.jsonl", [*right, {"question_id": 7, "text": "Yes"}])))
    twice = [{**right[0], "text": "No"}, *right]
    found = POPE.score(tmp_path, POPE.read(write_lines("c.jsonl", twice)))
    assert found.figures["f1_mean"] == 1
    assert "answered more than once: 1 question (100)" in found.warnings[0]
    as_text = [{**row, "question_id": str(row["question_id"])} for row in right]
    assert POPE.score(tmp_path, POPE.read(write_lines("d.jsonl", as_text))).figures["f1_mean"] == 1


def test_labels_of_another_commit(tmp_path: Path, asked: list[dict], write_lines: Callable) -> None:
    """Label files with other lines, other pictures or other questions are named; corrected articles are not another question."""
    answers = POPE.read(write_lines("answers.jsonl", _answers(asked, RIGHT)))
    rows = [json.loads(line) for line in (tmp_path / "coco/coco_pope_random.json").read_text().splitlines()]
    for changed, said in (
        ([*rows, rows[0]], "has 4 labels for 3 questions"),
        ([rows[0], {**rows[1], "image": "9.jpg"}, rows[2]], "line 2 is about another image than question 101"),
        ([rows[0], {**rows[1], "text": "Is there a cow?"}, rows[2]], "line 2 is about another text"),
        ([{**rows[0], "label": "Yes"}, *rows[1:]], "line 1 has the label 'Yes'"),
    ):
        write_lines("coco/coco_pope_random.json", changed)
        with pytest.raises(UserError, match=said):
            POPE.score(tmp_path, answers)
    (tmp_path / "coco/coco_pope_random.json").unlink()
    with pytest.raises(UserError, match="e3e39262"):
        POPE.score(tmp_path, answers)
