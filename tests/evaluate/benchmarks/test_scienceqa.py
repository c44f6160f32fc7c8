"""ScienceQA: the official letters and figures, questions as the original asks them, and the files its scoring leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmarks import benchmark
from fastllava.evaluate.benchmarks.scienceqa import chosen, parse

SCIENCEQA = benchmark("scienceqa")
PROBLEMS = {
    "1": {"choices": ["a", "b"], "answer": 1, "image": "image.png"},
    "2": {"choices": ["a", "b", "c"], "answer": 0, "image": "image.png"},
    "3": {"choices": ["a", "b"], "answer": 0, "image": None},
    "4": {"choices": ["a", "b", "c", "d", "e"], "answer": 4, "image": None},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small ScienceQA."""
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(PROBLEMS), "train": []}))
    return tmp_path


def _answers(texts: dict[str, str], tagged: str = "12") -> list[dict]:
    return [{"question_id": name, "prompt": "<image>\nq" if name in tagged else "q", "text": text} for name, text in texts.items()]


RIGHT = {"1": "B", "2": "A. a", "3": "The answer is A.", "4": "E"}


def test_equals_the_official_code(official: Path) -> None:
    """Every letter, verdict and figure of the recorded run, with answers missing and given twice."""
    data = official / "scorers" / "scienceqa"
    expected = json.loads((data / "expected.json").read_text())["test"]
    found = SCIENCEQA.score(data, SCIENCEQA.read(data / "answers.jsonl"))
    assert found.figures["accuracy"] == pytest.approx(expected["acc"], rel=1e-9)
    assert found.figures["img_accuracy"] == pytest.approx(expected["img_correct"] / expected["img_count"] * 100, rel=1e-9)
    assert (found.figures["count"], found.figures["img_count"]) == (expected["count"], expected["img_count"])
    fields = ("parsed", "pred_idx", "truth", "correct", "is_multimodal")
    assert {row["question_id"]: {name: row[name] for name in fields} for row in found.questions} == expected["per_question"]


READ = {"A": "A", "E. x": "E", "The answer is Apple": "A", "So. The answer is B. Yes": "B", "The answer is Z.": "Z"}
FAILED = ("The answer is B", "B.", "A.", "(A)", "a", " A", "A\n", "", "The answer is A. The answer is A.", "F. x", "BC")


@pytest.mark.parametrize(("text", "letter"), [*READ.items(), *((text, "FAILED") for text in FAILED)])
def test_letters_follow_the_official_rule(text: str, letter: str) -> None:
    """A lone letter, a letter with a point and a blank, or the sentence with any one character behind its letter."""
    assert parse(text) == letter


def test_a_letter_past_the_choices_is_none() -> None:
    """C of two choices, Z and FAILED are no choice."""
    assert [chosen(letter, 2) for letter in ("A", "B", "C", "Z", "FAILED", "")] == [0, 1, -1, -1, -1, -1]


def test_figures_of_a_small_one(data: Path, write_lines: Callable) -> None:
    """Percent over all, and over those with a picture."""
    found = SCIENCEQA.score(data, SCIENCEQA.read(write_lines("answers.jsonl", _answers({**RIGHT, "2": "C"}))))
    assert found.figures == {"accuracy": 75.0, "img_accuracy": 50.0, "count": 4, "img_count": 2}
    assert not found.warnings


def test_answers_that_the_rule_takes_for_something_else(data: Path, write_lines: Callable) -> None:
    """The figure is the official one; the warning says what it is by what the answers say."""
    found = SCIENCEQA.score(data, SCIENCEQA.read(write_lines("answers.jsonl", _answers({**RIGHT, "1": "(b)", "2": "A."}))))
    assert found.figures["accuracy"] == 50
    assert found.warnings == [
        "the official rule takes 2 answers (1: '(b)', 2: 'A.') for something else than they say: accuracy is 50.0000 by the rule, "
        "and 100.0000 by what they say"
    ]


def test_pictures_are_known_by_the_problem(data: Path, write_lines: Callable) -> None:
    """Without <image> in the answers' prompts the figure stays, and a warning says what the official code makes of it."""
    found = SCIENCEQA.score(data, SCIENCEQA.read(write_lines("none.jsonl", _answers({**RIGHT, "2": "C"}, tagged=""))))
    assert found.figures["img_accuracy"] == 50
    assert "ZeroDivisionError" in found.warnings[0]
    found = SCIENCEQA.score(data, SCIENCEQA.read(write_lines("one.jsonl", _answers({**RIGHT, "2": "C"}, tagged="1"))))
    assert found.figures["img_accuracy"] == 50
    assert (
        "here Accuracy 75.00, IMG-Accuracy 50.00 (1 of 2); the official code: Accuracy 75.00, IMG-Accuracy 100.00 (1 of 1)"
        in found.warnings[0]
    )


def test_problems_that_do_not_say_whether_there_is_a_picture(data: Path, write_lines: Callable) -> None:
    """Then the answers' prompts say it, as in the official code."""
    bare = {name: {"choices": row["choices"], "answer": row["answer"]} for name, row in PROBLEMS.items()}
    (data / "problems.json").write_text(json.dumps(bare))
    found = SCIENCEQA.score(data, SCIENCEQA.read(write_lines("answers.jsonl", _answers({**RIGHT, "2": "C"}))))
    assert found.figures["img_accuracy"] == 50
    assert not found.warnings


def test_ids_that_are_numbers(data: Path, write_lines: Callable) -> None:
    """The official code finds none of them and calls every answer wrong."""
    rows = [{**row, "question_id": int(row["question_id"])} for row in _answers(RIGHT)]
    found = SCIENCEQA.score(data, SCIENCEQA.read(write_lines("answers.jsonl", rows)))
    assert found.figures["accuracy"] == 100
    assert "here Accuracy 100.00" in found.warnings[0]
    assert "ZeroDivisionError" in found.warnings[0]


def test_missing_and_strange_answers(data: Path, write_lines: Callable) -> None:
    """A missing one is wrong and, as in the official code, without a picture; both figures are told. Others count nowhere."""
    rows = [*_answers({name: text for name, text in RIGHT.items() if name != "2"}), {"question_id": "77", "prompt": "", "text": "A"}]
    found = SCIENCEQA.score(data, SCIENCEQA.read(write_lines("answers.jsonl", rows)))
    assert found.figures == {"accuracy": 75.0, "img_accuracy": 100.0, "count": 4, "img_count": 1}
    assert "1 answer (77) to no question of the test split" in found.warnings[0]
    assert "with the 1 that have one IMG-Accuracy would be 50.00" in found.warnings[1]
    with pytest.raises(UserError, match="answers no question about a picture"):
        SCIENCEQA.score(data, SCIENCEQA.read(write_lines("b.jsonl", _answers({"3": "A"}))))


def test_files_that_the_official_scoring_leaves(data: Path) -> None:
    """Its _output and its _result are scored as the answers that they were made of; an _output also without problems.json."""
    rows = [
        {
            "question_id": name,
            "question": "<image>\nq" if name in "12" else "q",
            "pred": text,
            "ground_truth": truth,
            "is_multimodal": name in "12",
        }
        for (name, text), truth in zip(RIGHT.items(), "BCAE", strict=True)
    ]
    missing = {"question_id": "4", "question": "Unknown", "pred": "FAILED", "ground_truth": "E"}
    output, result = data / "x_output.jsonl", data / "x_result.json"
    output.write_text(json.dumps({"correct": [rows[0], rows[2]], "incorrect": [rows[1], missing]}, indent=2))
    result.write_text(json.dumps({"acc": 100.0, "correct": 4, "count": 4, "results": {"1": 1}, "outputs": RIGHT}, indent=2))
    assert SCIENCEQA.score(data, SCIENCEQA.read(result)).figures == {"accuracy": 100.0, "img_accuracy": 100.0, "count": 4, "img_count": 2}
    assert SCIENCEQA.score(data, SCIENCEQA.read(output)).figures == {"accuracy": 75.0, "img_accuracy": 100.0, "count": 4, "img_count": 2}
    (data / "problems.json").unlink()
    output.write_text(json.dumps({"correct": [rows[0], rows[2], rows[3]], "incorrect": [rows[1]]}))
    own = SCIENCEQA.score(data, SCIENCEQA.read(output))
    assert own.figures == {"accuracy": 75.0, "img_accuracy": 50.0, "count": 4, "img_count": 2}


def test_problems_that_are_damaged(data: Path, write_lines: Callable) -> None:
    """A problem without a right choice is named: the official code takes -1 for the answer of whoever gives none."""
    answers = SCIENCEQA.read(write_lines("answers.jsonl", _answers(RIGHT)))
    (data / "problems.json").write_text(json.dumps({**PROBLEMS, "3": {"choices": ["a"], "answer": -1}}))
    with pytest.raises(UserError, match="problem 3 has the answer -1"):
        SCIENCEQA.score(data, answers)
    (data / "problems.json").write_text("{")
    with pytest.raises(UserError, match=r"problems\.json is no JSON"):
        SCIENCEQA.score(data, answers)
    (data / "problems.json").write_text("{}")
    with pytest.raises(UserError, match="do not fit"):
        SCIENCEQA.score(data, answers)


def test_questions(tmp_path: Path) -> None:
    """The tag goes, the sentence comes, and the answers file's prompt has the tag in front again."""
    rows = [
        {"id": "1", "image": "1/image.png", "conversations": [{"from": "human", "value": "<image>\nWhich?\nA. a\nB. b"}]},
        {"id": "2", "conversations": [{"from": "human", "value": "Context: c\nWhich?\nA. a\nB. b"}]},
    ]
    (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    one, two = SCIENCEQA.questions(tmp_path)
    assert one.text == "Which?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly."
    assert (one.prompt, one.image) == (f"<image>\n{one.text}", tmp_path / "images/test/1/image.png")
    assert (two.prompt, two.image) == (two.text, None)
    (tmp_path / "llava_test_CQM-A.json").write_text(json.dumps([rows[0], {"id": "2"}]))
    with pytest.raises(UserError, match="question 2 has no id or no conversations"):
        SCIENCEQA.questions(tmp_path)
