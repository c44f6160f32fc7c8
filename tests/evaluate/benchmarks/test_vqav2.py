"""VQAv2: the upload that the official converter writes, and the VQA evaluation on the validation set."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Missing, ServerScored
from fastllava.evaluate.benchmarks import benchmark

VQA = benchmark("vqav2")
SENTENCE = "\nAnswer the question using a single word or phrase."
SECRET = [7, 8, 9]


@pytest.fixture
def val(tmp_path: Path) -> Callable[..., None]:
    """Write the validation set's labels: for each question one list of texts, and fields that every label has besides."""

    def write(*questions: list[str], **fields: Any) -> None:
        rows = [
            {
                "question_id": id,
                "answer_type": "other",
                "answers": [{"answer": text, "answer_id": n, **fields} for n, text in enumerate(labels, 1)],
            }
            for id, labels in zip(SECRET, questions, strict=False)
        ]
        (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": rows}))

    return write


@pytest.fixture
def answers(write_lines: Callable) -> Callable[[Iterable[tuple[Any, str]]], Path]:
    """Write an answers file of (question_id, text)."""
    return lambda pairs: write_lines("answers.jsonl", [{"question_id": id, "prompt": "", "text": text} for id, text in pairs])


def test_equals_the_official_evaluation(official: Path) -> None:
    """Both figures and both verdicts of every question, which the official code gives with two digits."""
    data = official / "scorers" / "vqav2"
    expected = json.loads((data / "val_expected.json").read_text())
    found = VQA.score(data, VQA.read(data / "val_answers.jsonl"))
    for figure, score, run in (("accuracy", "score", "uploaded"), ("accuracy_raw", "score_raw", "raw_text")):
        assert round(found.figures[figure], 2) == expected[run]["accuracy"]["overall"]
        assert {str(row["question_id"]): round(100 * row[score], 2) for row in found.questions} == expected[run]["per_question"]
    assert not found.warnings


def test_upload_equals_the_official_one(official: Path, tmp_path: Path) -> None:
    """Byte for byte, with a broken line and a question answered twice."""
    data = official / "scorers" / "vqav2"
    (file,) = VQA.upload(data, VQA.read(data / "submit" / "merge.jsonl"), tmp_path)
    assert file.read_bytes() == (data / "submit" / "expected_upload.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["vqav2_upload.json"]


@pytest.mark.parametrize(
    ("labels", "text", "accuracy", "raw"),
    [
        (["red"] * 10, "red", 100, 100),
        (["red"] * 9 + ["blue"], "Red.", 100, 100),
        (["red"] * 3 + ["blue"] * 7, "red", 90, 90),
        (["red"] * 2 + ["blue"] * 8, "red", 60, 60),
        (["red"] + ["blue"] * 9, "red", 30, 30),
        # Labels that are all the same are compared as they are written: "Red." is wrong, and a label in capitals cannot be met.
        (["red"] * 10, "Red.", 100, 0),
        (["Red"] * 10, "Red", 0, 100),
        ([" red\n"] * 10, "red", 100, 100),
        # The upload's form loses what the evaluation's keeps.
        (["cook's hat"] * 5 + ["hat"] * 5, "the cook's hat", 0, 100),
        (["red blue"] * 5 + ["red"] * 5, "red,blue", 0, 100),
        (["i"] * 5 + ["red"] * 5, "\u0130", 0, 100),
        (["red"] * 10, "", 0, 0),
    ],
)
def test_accuracy(tmp_path: Path, val: Callable, answers: Callable, labels: list[str], text: str, accuracy: float, raw: float) -> None:
    """Both figures for one question, in percent."""
    val(labels)
    found = VQA.score(tmp_path, VQA.read(answers([(7, text)])))
    assert found.figures == pytest.approx({"accuracy": accuracy, "accuracy_raw": raw})
    assert found.questions[0]["score"] == pytest.approx(accuracy / 100)


def test_questions_of_the_test_set(tmp_path: Path, write_lines: Callable) -> None:
    """Those of test-dev, with their pictures below test2015."""
    row = {"question_id": 1000, "image": "COCO_test2015_000000000001.jpg", "text": f"What is it?{SENTENCE}", "category": "default"}
    write_lines("llava_vqav2_mscoco_test-dev2015.jsonl", [row])
    with pytest.raises(Missing, match=r"test2015 is not there; .*zips/test2015\.zip"):
        VQA.questions(tmp_path)
    (tmp_path / "test2015").mkdir()
    (question,) = VQA.questions(tmp_path)
    assert (question.id, question.text, question.prompt) == (1000, row["text"], row["text"])
    assert question.image == tmp_path / "test2015" / row["image"]


def test_questions_of_the_validation_set(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """Where only that is there it is asked, scored, and not uploaded."""
    asked = [{"question_id": 7, "image_id": 42, "question": "What is it?"}]
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "val2014").mkdir()
    (question,) = VQA.questions(tmp_path)
    assert question.text == f"What is it?{SENTENCE}"
    assert question.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    val(["red"] * 10)
    found = VQA.read(answers([(7, "red")]))
    assert VQA.score(tmp_path, found).figures["accuracy"] == 100
    assert VQA.upload(tmp_path, found, tmp_path / "out") == []


def test_upload_has_every_question_of_test2015(tmp_path: Path, write_lines: Callable, answers: Callable) -> None:
    """In the order of the file; without an answer it is empty, and the last of two answers counts."""
    write_lines("llava_vqav2_mscoco_test2015.jsonl", [{"question_id": id} for id in (3, 1, 2)])
    given = VQA.read(answers([(1, "A dog"), (3, "two,three"), (1, "The cats, \u00e9t\u00e9")]))
    (file,) = VQA.upload(tmp_path, given, tmp_path / "new" / "out")
    expected = [
        {"question_id": 3, "answer": "twothree"},
        {"question_id": 1, "answer": "cats \u00e9t\u00e9"},
        {"question_id": 2, "answer": ""},
    ]
    assert file.read_text() == json.dumps(expected)


@pytest.mark.parametrize("ids", [(8, 9), ("7", "8")])
def test_upload_refuses_answers_to_other_questions(tmp_path: Path, write_lines: Callable, answers: Callable, ids: tuple) -> None:
    """The official converter writes nothing but empty answers for them."""
    write_lines("llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 7}])
    with pytest.raises(UserError, match=r"no answer in|has the text '7' as its question_id .* number 7; write 7"):
        VQA.upload(tmp_path, VQA.read(answers((id, "red") for id in ids)), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_score_refuses_what_the_official_code_refuses(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """An answer too few, one too many, ids as text, labels that are none."""
    val(["red"] * 10, ["blue"] * 10)
    for pairs, says in {
        ((7, "red"),): r"1 of 2 questions .* have no answer .*first is 8",
        ((7, "red"), (8, "red"), (1, "red")): r"1 answers .* does not have \(such as 1\)",
        (("7", "red"), ("8", "red")): r"has the text '7'",
    }.items():
        with pytest.raises(UserError, match=says):
            VQA.score(tmp_path, VQA.read(answers(pairs)))
    val([])
    with pytest.raises(UserError, match=r"annotation 0 of .* has no list of label texts"):
        VQA.score(tmp_path, VQA.read(answers([(7, "red")])))


def test_what_only_the_server_scores(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """Without the labels of the validation set, and for answers to the test set: a word about the upload."""
    given = VQA.read(answers([(1000, "red")]))
    with pytest.raises(ServerScored, match=r"upload vqav2_upload\.json, which `fastllava eval` writes"):
        VQA.score(tmp_path, given)
    val(["red"] * 10)
    with pytest.raises(ServerScored, match=r"challenge-page/830"):
        VQA.score(tmp_path, given)


def test_two_answers_to_one_question(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """The last one counts, and a warning says what the first one makes."""
    val(["red"] * 10)
    found = VQA.score(tmp_path, VQA.read(answers([(7, "red"), (7, "blue")])))
    assert found.figures["accuracy"] == 0
    assert "with the first ones it is 100" in found.warnings[0]


def test_few_labels(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """The rule counts matches among the other annotators: with three labels no answer is wholly right."""
    val(["red"] * 3)
    found = VQA.score(tmp_path, VQA.read(answers([(7, "red")])))
    assert found.figures["accuracy"] == pytest.approx(100 * 2 / 3)
    assert "66.67%" in found.warnings[0]


def test_labels_without_ids_of_their_own(tmp_path: Path, val: Callable, answers: Callable) -> None:
    """The official code compares whole labels: without ids, equal ones are one annotator. Its figure, and a warning with ours."""
    val(["red"] * 5 + ["blue"] * 5, answer_id=1)
    found = VQA.score(tmp_path, VQA.read(answers([(7, "red")])))
    assert found.figures["accuracy"] == pytest.approx(50)
    assert "(50.00); with an answer_id for each label, as in the published file, it is 100.00" in found.warnings[0]


def test_byte_order_mark_does_not_cost_an_answer(tmp_path: Path, write_lines: Callable, answers: Callable) -> None:
    """The official converter takes a first line with one for a broken line, and leaves its answer out."""
    write_lines("llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 7}])
    file = answers([(7, "red")])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    (written,) = VQA.upload(tmp_path, VQA.read(file), tmp_path / "out")
    assert json.loads(written.read_text()) == [{"question_id": 7, "answer": "red"}]


@pytest.mark.parametrize("line", ['{"question_id": 7, "text": null}', '{"question_id": 7}', '{"text": "red"}', "7", "[]"])
def test_lines_that_are_json_and_no_answer(tmp_path: Path, val: Callable, write_lines: Callable, answers: Callable, line: str) -> None:
    """The official converter stops at these, and passes over a torn line; the score says so."""
    write_lines("llava_vqav2_mscoco_test2015.jsonl", [{"question_id": 7}])
    val(["red"] * 10)
    file = answers([(7, "red")])
    file.write_text(file.read_text() + '{"question_id": 7, "te')
    VQA.upload(tmp_path, VQA.read(file), tmp_path / "out")
    assert "no JSON: 1;" in VQA.score(tmp_path, VQA.read(file)).warnings[0]
    file.write_text(f"{file.read_text()}\n{line}")
    for run in (VQA.score, lambda data, given: VQA.upload(data, given, tmp_path / "out")):
        with pytest.raises(UserError, match=r"line 3 of .* is JSON but no answer"):
            run(tmp_path, VQA.read(file))
