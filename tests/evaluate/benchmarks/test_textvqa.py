"""TextVQA: answers that find their labels by what their prompt says was asked, and the mean over them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Missing
from fastllava.evaluate.benchmarks import benchmark

TEXT = benchmark("textvqa")
SENTENCE = "\nAnswer the question using a single word or phrase."
NINE_OF_TEN = ["STOP"] * 9 + ["go"]


@pytest.fixture
def labels(tmp_path: Path) -> Callable[..., None]:
    """Write annotations of (image, question, labels)."""

    def write(*annotations: tuple[str, str, list]) -> None:
        rows = [{"image_id": i, "question": q, "answers": a, "question_id": n} for n, (i, q, a) in enumerate(annotations, 100)]
        (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))

    return write


@pytest.fixture
def score(tmp_path: Path, write_lines: Callable) -> Callable:
    """Score answers of (image, prompt, text)."""

    def run(*answers: tuple) -> object:
        rows = [{"question_id": image, "prompt": prompt, "text": text} for image, prompt, text in answers]
        return TEXT.score(tmp_path, TEXT.read(write_lines("answers.jsonl", rows)))

    return run


def test_equals_the_official_code(official: Path) -> None:
    """The figure, and score, labels and form of every answer, in four layouts of the prompt."""
    data = official / "scorers" / "textvqa"
    expected = json.loads((data / "expected.json").read_text(encoding="utf-8"))
    found = TEXT.score(data, TEXT.read(data / "answers.jsonl"))
    assert found.figures == {"accuracy": pytest.approx(expected["accuracy"], rel=1e-9)}
    rows = [{key: row[key] for key in ("line", "annotation_question_id", "normalised")} for row in found.questions]
    assert rows == [{key: row[key] for key in ("line", "annotation_question_id", "normalised")} for row in expected["per_answer"]]
    assert [row["score"] for row in found.questions] == pytest.approx([row["score"] for row in expected["per_answer"]], abs=1e-12)
    assert "asked twice" in found.warnings[0]


@pytest.mark.parametrize(
    "prompt",
    [
        f"What does it say?\nReference OCR token: STOP, go{SENTENCE}",
        f"What does it say?\nReference OCR token: {SENTENCE}",
        f"Reference OCR token: STOP, go\nWhat does it say?{SENTENCE}",
        f"what does it SAY?{SENTENCE}",
        "OCR tokens: STOP go. Question: What does it say? Short answer:",
        "OCR tokens: a\nb. Question: What does it say? Short answer: x Short answer:",
    ],
)
def test_layouts_of_the_prompt(labels: Callable, score: Callable, prompt: str) -> None:
    """The question is found in each layout that the official code knows, and in any case."""
    labels(("4f1c", "What does it say?", NINE_OF_TEN))
    found = score(("4f1c", prompt, "Stop."))
    assert found.figures["accuracy"] == 1
    assert found.questions == [{"question_id": "4f1c", "line": 0, "annotation_question_id": 100, "normalised": "stop", "score": 1}]
    assert not [warning for warning in found.warnings if "OCR" not in warning]


def test_line_break_in_a_question(labels: Callable, score: Callable) -> None:
    """One of the four layouts carries it, as in the official code; the others are refused."""
    labels(("4f1c", "What does\nit say?", NINE_OF_TEN))
    assert score(("4f1c", "OCR tokens: STOP. Question: What does\nit say? Short answer:", "stop")).figures["accuracy"] == 1
    with pytest.raises(UserError, match="has a layout that the official code cannot read"):
        score(("4f1c", f"What does\nit say?{SENTENCE}", "stop"))


def test_prompts_without_ocr_tokens(labels: Callable, score: Callable) -> None:
    """These are scored, and said to be another benchmark than the published one, where they are most."""
    labels(("4f1c", "What?", NINE_OF_TEN), ("4f1c", "Who?", NINE_OF_TEN))
    with_tokens = ("4f1c", f"What?\nReference OCR token: STOP{SENTENCE}", "stop")
    assert not score(with_tokens, ("4f1c", f"Who?{SENTENCE}", "stop")).warnings
    bare = score(("4f1c", f"What?{SENTENCE}", "stop"), ("4f1c", f"Who?{SENTENCE}", "stop"))
    assert bare.figures["accuracy"] == 1
    assert "without a line of OCR tokens: 2 of 2" in bare.warnings[0]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "What does it say?",
        f"What does\nit say?\nReference OCR token: STOP{SENTENCE}",
        f"What does it say?\nOCR: STOP{SENTENCE}",
        f"What does it say?\nReference OCR token:STOP{SENTENCE}",
        "OCR tokens: STOP. What does it say?",
    ],
)
def test_other_layouts_are_refused(labels: Callable, score: Callable, prompt: str) -> None:
    """Where the official code stops with an assertion there is a message that shows the layouts."""
    labels(("4f1c", "What does it say?", NINE_OF_TEN))
    with pytest.raises(UserError, match=r"the prompt of answer 1 in .* has a layout that the official code cannot read"):
        score(("4f1c", prompt, "stop"))


def test_questions_that_are_not_asked(labels: Callable, score: Callable) -> None:
    """Another question, another image, and an image's id as a number."""
    labels(("41", "What does it say?", NINE_OF_TEN))
    for image, question in (("41", "Who says it?"), ("42", "What does it say?"), (41, "What does it say?")):
        with pytest.raises(UserError, match=rf"answer 1 in .* is to {question.lower()!r} about the image {image!r}".replace("?", r"\?")):
            score((image, question + SENTENCE, "stop"))


def test_annotations_need_ten_labels(labels: Callable, score: Callable) -> None:
    """As in the official code."""
    labels(("4f1c", "What?", ["stop"] * 9))
    with pytest.raises(UserError, match=r"annotation 0 of .* has 9 answers, not 10"):
        score(("4f1c", f"What?{SENTENCE}", "stop"))
    labels(("4f1c", "What?", ["stop"] * 9 + [None]))
    with pytest.raises(UserError, match="has no list of label texts under answers"):
        score(("4f1c", f"What?{SENTENCE}", "stop"))


def test_broken_lines_are_refused(tmp_path: Path, labels: Callable, write_lines: Callable) -> None:
    """An answers file with a broken line is not scored, as in the official code."""
    labels(("4f1c", "What?", NINE_OF_TEN))
    file = write_lines("answers.jsonl", [{"question_id": "4f1c", "prompt": f"What?{SENTENCE}", "text": "stop"}])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert TEXT.score(tmp_path, TEXT.read(file)).figures["accuracy"] == 1
    file.write_bytes(file.read_bytes() + b'{"question_id": "4f')
    with pytest.raises(UserError, match=r"line 3 of .* is no answer"):
        TEXT.score(tmp_path, TEXT.read(file))


def test_one_question_twice_about_one_image(labels: Callable, score: Callable) -> None:
    """The last annotation's labels count for both, as in the official code, and a warning says what each by its own makes."""
    labels(("4f1c", "What?", ["red"] * 10), ("4f1c", "what?", ["blue"] * 10))
    found = score(("4f1c", f"What?{SENTENCE}", "red"), ("4f1c", f"what?{SENTENCE}", "blue"))
    assert [row["score"] for row in found.questions] == [0, 1]
    assert [row["annotation_question_id"] for row in found.questions] == [101, 101]
    assert found.figures["accuracy"] == 0.5
    assert "(0.5000); each by its own, the accuracy is 1.0000" in found.warnings[0]


def test_missing_answers(labels: Callable, score: Callable) -> None:
    """The official code takes the mean over what is there; a warning says what it is over all."""
    labels(("4f1c", "What?", ["red"] * 10), ("4f1c", "Who?", ["red"] * 10))
    found = score(("4f1c", f"What?{SENTENCE}", "red"))
    assert found.figures["accuracy"] == 1
    assert found.warnings[:1] == [
        "questions without an answer: 1; the official code takes the mean over the answers that are there, 1 (1.0000); "
        "over all questions it is 0.5000"
    ]


def test_answers_to_one_question_twice(labels: Callable, score: Callable) -> None:
    """The official code counts every line; a warning says what the last answers make."""
    labels(("4f1c", "What?", ["red"] * 10), ("4f1c", "Who?", ["red"] * 10))
    found = score(("4f1c", f"What?{SENTENCE}", "blue"), ("4f1c", f"Who?{SENTENCE}", "red"), ("4f1c", f"What?{SENTENCE}", "red"))
    assert found.figures["accuracy"] == pytest.approx(2 / 3)
    assert "(0.6667); with the last answer to each question, the accuracy is 1.0000" in found.warnings[0]


def test_questions(tmp_path: Path, write_lines: Callable) -> None:
    """The file's texts with their OCR line; several questions under one image's id."""
    rows = [
        {"question_id": "4f1c", "image": "4f1c.jpg", "text": f"{asked}\nReference OCR token: {tokens}{SENTENCE}"}
        for asked, tokens in (("What?", "STOP, go"), ("Who?", ""))
    ]
    write_lines("llava_textvqa_val_v051_ocr.jsonl", rows)
    with pytest.raises(Missing, match=r"train_images is not there; .*train_val_images\.zip"):
        TEXT.questions(tmp_path)
    (tmp_path / "train_images").mkdir()
    questions = TEXT.questions(tmp_path)
    assert [(question.id, question.text, question.prompt) for question in questions] == [("4f1c", row["text"], row["text"]) for row in rows]
    assert questions[0].image == tmp_path / "train_images" / "4f1c.jpg"
