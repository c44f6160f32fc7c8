"""GQA: the predictions file that the official converter writes, and the accuracy over balanced questions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Missing
from fastllava.evaluate.benchmarks import benchmark

GQA = benchmark("gqa")


def _question(answer: str, structural: str = "query", balanced: bool = True) -> dict:
    return {"answer": answer, "isBalanced": balanced, "types": {"structural": structural, "semantic": "obj"}}


@pytest.fixture
def labels(tmp_path: Path) -> Callable[..., None]:
    """Write labels of questions "1", "2", ... where the original's GQA folder has them."""

    def write(*questions: dict, folder: str = "data") -> None:
        file = tmp_path / folder / "testdev_balanced_questions.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({str(n): question for n, question in enumerate(questions, 1)}))

    return write


@pytest.fixture
def answers(write_lines: Callable) -> Callable[..., Path]:
    """Write an answers file of (question_id, text)."""
    return lambda *pairs: write_lines("answers.jsonl", [{"question_id": id, "text": text} for id, text in pairs])


def test_equals_the_official_code(official: Path, tmp_path: Path) -> None:
    """Figures, the verdict of every balanced question, and the predictions byte for byte."""
    data = official / "scorers" / "gqa"
    expected = json.loads((data / "expected.json").read_text())
    answers = GQA.read(data / "answers.jsonl")
    found = GQA.score(data, answers)
    assert {row["question_id"]: row["verdict"] for row in found.questions} == expected["per_question"]
    assert found.figures["accuracy"] == pytest.approx(
        100 * sum(expected["per_question"].values()) / len(expected["per_question"]), rel=1e-9
    )
    for figure, official_one in (("accuracy", "accuracy_percent"), ("binary", "binary"), ("open", "open")):
        assert round(found.figures[figure], 2) == expected[official_one]
    (file,) = GQA.upload(data, answers, tmp_path)
    assert file.name == "testdev_balanced_predictions.json"
    assert file.read_bytes() == (data / "expected_predictions.json").read_bytes()


@pytest.mark.parametrize("folder", ["data", "data/questions1.2", "data/questions", "."])
def test_figures(tmp_path: Path, labels: Callable, answers: Callable, folder: str) -> None:
    """By kind of answer, over balanced questions only, wherever the labels were unpacked."""
    kinds = ("verify", "logical", "choose", "compare")
    labels(_question("red"), *(_question("yes", kind) for kind in kinds), _question("no", balanced=False), folder=folder)
    given = answers(("1", "Red."), ("2", "yes"), ("3", "Yes..."), ("4", "no"), ("5", "yes."), ("99", "unknown"))
    found = GQA.score(tmp_path, GQA.read(given))
    assert found.figures == {"accuracy": 80, "binary": 75, "open": 100}
    assert found.questions[0] == {
        "question_id": "1", "line": 0, "score": 1, "verdict": 1, "prediction": "red", "type": "open", "structural": "query",
        "semantic": "obj",
    }  # fmt: skip
    assert not found.warnings


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("Table. It is.", "table. it is"),
        (" Chair ", " chair "),
        ("T-shirt!", "t-shirt!"),
        ("..", ""),
        ("", ""),
        ("\u0130.", "i\u0307"),
        ("the dog", "the dog"),
    ],
)
def test_predictions(tmp_path: Path, answers: Callable, text: str, prediction: str) -> None:
    """Only the periods at the end and capitals go; every line of the file is there, in its order."""
    (file,) = GQA.upload(tmp_path, GQA.read(answers(("2", text), ("1", "x"), ("2", "y"))), tmp_path / "out")
    expected = [("2", prediction), ("1", "x"), ("2", "y")]
    assert file.read_text() == json.dumps([{"questionId": id, "prediction": text} for id, text in expected])


def test_blanks_at_the_ends(tmp_path: Path, labels: Callable, answers: Callable) -> None:
    """The official code counts an answer with a blank before it as wrong; a warning says what it costs."""
    labels(_question("red"), _question("blue"))
    found = GQA.score(tmp_path, GQA.read(answers(("1", " red"), ("2", "blue"))))
    assert found.figures["accuracy"] == 50
    assert "(50.00); without them the accuracy is 100.00" in found.warnings[0]


def test_a_kind_without_questions(tmp_path: Path, labels: Callable, answers: Callable) -> None:
    """It is 0, as in the official code."""
    labels(_question("red"))
    assert GQA.score(tmp_path, GQA.read(answers(("1", "red")))).figures == {"accuracy": 100, "binary": 0, "open": 100}


def test_two_answers_to_one_question(tmp_path: Path, labels: Callable, answers: Callable) -> None:
    """The last one counts, and a warning says what the first one makes."""
    labels(_question("red"))
    found = GQA.score(tmp_path, GQA.read(answers(("1", "blue"), ("1", "red"))))
    assert found.figures["accuracy"] == 100
    assert "with the first ones it is 0" in found.warnings[0]


def test_refusals(tmp_path: Path, labels: Callable, answers: Callable) -> None:
    """Missing answers and ids as numbers, where the official code stops; broken lines; labels that are none."""
    labels(_question("red"), _question("blue"))
    with pytest.raises(UserError, match=r"1 of 2 balanced questions have no answer .*first is '2'"):
        GQA.score(tmp_path, GQA.read(answers(("1", "red"))))
    with pytest.raises(UserError, match=r'answer 1 has the number 1 as its question_id .* text \'1\'; write "1"'):
        GQA.score(tmp_path, GQA.read(answers((1, "red"), (2, "blue"))))
    broken = answers(("1", "red"), ("2", "blue"))
    broken.write_text(broken.read_text() + '{"question_id": "1", "te')
    for run in (GQA.score, lambda data, given: GQA.upload(data, given, tmp_path / "out")):
        with pytest.raises(UserError, match="line 3 of"):
            run(tmp_path, GQA.read(broken))
    labels({"question": "Is it red?", "imageId": "n1", "isBalanced": True})
    with pytest.raises(UserError, match=r"question 1 of .* types\.structural"):
        GQA.score(tmp_path, GQA.read(answers(("1", "red"))))
    labels(_question("red", balanced=False))
    with pytest.raises(UserError, match="has no balanced question"):
        GQA.score(tmp_path, GQA.read(answers(("1", "red"))))


def test_questions(tmp_path: Path, write_lines: Callable) -> None:
    """The file's texts, with images below data/images; labels that are not there are named with where they come from."""
    row = {"question_id": "1", "image": "n1.jpg", "text": "Is it red?\nAnswer the question using a single word or phrase."}
    write_lines("llava_gqa_testdev_balanced.jsonl", [row])
    (tmp_path / "data" / "images").mkdir(parents=True)
    (question,) = GQA.questions(tmp_path)
    assert (question.id, question.text, question.image) == ("1", row["text"], tmp_path / "data" / "images" / "n1.jpg")
    with pytest.raises(Missing, match=r"testdev_balanced_questions\.json is not there; .*questions1\.2\.zip"):
        GQA.score(tmp_path, GQA.read(write_lines("answers.jsonl", [{"question_id": "1", "text": "red"}])))
