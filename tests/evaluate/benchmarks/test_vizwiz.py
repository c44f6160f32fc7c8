"""VizWiz: the upload that the official converter writes, and the accuracy on the validation set."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Missing, ServerScored
from fastllava.evaluate.benchmarks import benchmark

VIZ = benchmark("vizwiz")
SENTENCES = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\nAnswer the question using a single word or phrase."
)


@pytest.fixture
def val(tmp_path: Path) -> Callable[..., None]:
    """Write the validation set: a list of label texts for each question."""

    def write(*questions: list[str]) -> None:
        rows = [
            {
                "image": f"VizWiz_val_{n:08d}.jpg",
                "question": f"WHAT is number {n}?  ",
                "answer_type": "other",
                "answers": [{"answer": text, "answer_confidence": "yes"} for text in labels],
            }
            for n, labels in enumerate(questions)
        ]
        (tmp_path / "val.json").write_text(json.dumps(rows))

    return write


@pytest.fixture
def answers(write_lines: Callable) -> Callable[..., Path]:
    """Write an answers file of (question_id, text), to the questions of `val`."""

    def write(*pairs: tuple, asked: str = "What is number") -> Path:
        rows = [{"question_id": id, "prompt": f"{asked} {id}?  {SENTENCES}", "text": text} for id, text in pairs]
        return write_lines("answers.jsonl", rows)

    return write


def test_equals_the_recorded_scores(official: Path) -> None:
    """The accuracy, and the score of every question."""
    data = official / "scorers" / "vizwiz"
    expected = json.loads((data / "val_expected_lmms_eval.json").read_text())
    found = VIZ.score(data, VIZ.read(data / "val_answers.jsonl"))
    assert found.figures == {"accuracy": pytest.approx(expected["accuracy"], rel=1e-9)}
    assert [row["score"] for row in found.questions] == pytest.approx(expected["per_question"], abs=1e-12)


def test_upload_equals_the_official_one(official: Path, tmp_path: Path) -> None:
    """Byte for byte, from answers in another order with a broken line."""
    data = official / "scorers" / "vizwiz"
    (file,) = VIZ.upload(data, VIZ.read(data / "answers.jsonl"), tmp_path)
    assert file.read_bytes() == (data / "expected_upload.json").read_bytes()


def test_test_answers_are_not_scored_as_validation_answers(official: Path, tmp_path: Path, val: Callable, answers: Callable) -> None:
    """Both sets number their questions from 0: what tells them apart is the question in the prompt."""
    data = official / "scorers" / "vizwiz"
    with pytest.raises(ServerScored, match=r"and the prompts of .* are other questions"):
        VIZ.score(data, VIZ.read(data / "answers.jsonl"))
    val(["red"] * 10)
    with pytest.raises(ServerScored, match=r"upload vizwiz_upload\.json, which `fastllava eval` writes"):
        VIZ.score(tmp_path, VIZ.read(answers((0, "red"), asked="Which bus is number")))


def test_accuracy(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """Labels and answers are put into the upload's form, also where all labels are the same."""
    val(["Red."] * 10, ["the bus's door"] * 2 + ["unanswerable"] * 8, ["one"] + ["two"] * 9, ["a"] * 10)
    found = VIZ.score(tmp_path, VIZ.read(answers((3, ""), (0, "red"), (1, "Bus's door"), (2, "1"))))
    assert [row["score"] for row in found.questions] == pytest.approx([1, 0.6, 0.3, 1])
    assert [row["line"] for row in found.questions] == [1, 2, 3, 0]
    assert found.figures["accuracy"] == pytest.approx(2.9 / 4)
    assert not found.warnings


def test_labels_as_plain_texts_and_few_of_them(tmp_path: Path, answers: Callable) -> None:
    """Other copies of the set hold texts alone; with three of them nothing is wholly right, and a warning says so."""
    (tmp_path / "val.json").write_text(json.dumps([{"image": "0.jpg", "question": "What is number 0?", "answers": ["red"] * 3}]))
    found = VIZ.score(tmp_path, VIZ.read(answers((0, "red"))))
    assert found.figures["accuracy"] == pytest.approx(2 / 3)
    assert "at most 66.67%" in found.warnings[0]


def test_refusals(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """What cannot be scored, with the reason."""
    with pytest.raises(ServerScored, match="VizWiz challenge's server"):
        VIZ.score(tmp_path, VIZ.read(answers((0, "red"))))
    val(["red"] * 10, ["blue"] * 10)
    with pytest.raises(UserError, match=r"1 of 2 questions of .*val\.json have no answer .*first is 1"):
        VIZ.score(tmp_path, VIZ.read(answers((0, "red"))))
    with pytest.raises(UserError, match=r"has the text '0' as its question_id"):
        VIZ.score(tmp_path, VIZ.read(answers(("0", "red"), ("1", "red"))))
    with pytest.raises(UserError, match=r"answers question 2, which .*val\.json does not have"):
        VIZ.score(tmp_path, VIZ.read(answers((0, "red"), (1, "red"), (2, "red"))))


def test_two_answers_to_one_question(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """The last one counts, and a warning says what the first one makes."""
    val(["red"] * 10)
    found = VIZ.score(tmp_path, VIZ.read(answers((0, "blue"), (0, "red"))))
    assert found.figures["accuracy"] == 1
    assert "with the first ones it is 0" in found.warnings[0]


def test_upload(tmp_path: Path, write_lines: Callable, answers: Callable) -> None:
    """In the order of the question file; a question without an answer is refused, as in the official converter."""
    asked = [{"question_id": n, "image": f"VizWiz_test_{n:08d}.jpg", "text": "What?"} for n in (1, 0)]
    write_lines("llava_test.jsonl", asked)
    (file,) = VIZ.upload(tmp_path, VIZ.read(answers((0, "Dr. Pepper"), (1, "\u5317,\u4eac"), (7, "x"))), tmp_path / "out")
    expected = [{"image": asked[0]["image"], "answer": "\u5317\u4eac"}, {"image": asked[1]["image"], "answer": "dr pepper"}]
    assert file.read_text() == json.dumps(expected)
    with pytest.raises(UserError, match=r"1 of 2 test questions have no answer .*first is 1"):
        VIZ.upload(tmp_path, VIZ.read(answers((0, "x"))), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_questions(tmp_path: Path, val: Callable, write_lines: Callable, answers: Callable) -> None:
    """Those of the test set, or of the validation set where only that is there: asked with the original's sentences."""
    val(["red"] * 10)
    with pytest.raises(Missing, match=r"val is not there; .*images/val\.zip"):
        VIZ.questions(tmp_path)
    (tmp_path / "val").mkdir()
    (question,) = VIZ.questions(tmp_path)
    assert (question.id, question.text) == (0, f"What is number 0?  {SENTENCES}")
    assert question.image == tmp_path / "val" / "VizWiz_val_00000000.jpg"
    assert VIZ.upload(tmp_path, VIZ.read(answers((0, "red"))), tmp_path / "out") == []
    write_lines("llava_test.jsonl", [{"question_id": 0, "image": "VizWiz_test_00000000.jpg", "text": f"What?{SENTENCES}"}])
    (tmp_path / "test").mkdir()
    (question,) = VIZ.questions(tmp_path)
    assert (question.text, question.image) == (f"What?{SENTENCES}", tmp_path / "test" / "VizWiz_test_00000000.jpg")
