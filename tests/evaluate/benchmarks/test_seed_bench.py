"""SEED-Bench: the official percentages and upload, and ids of either type."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmarks import benchmark

SEED = benchmark("seed_bench")
ONE = {"answer": "A", "data_type": "image", "question_type_id": 1}
TYPES = {"Instance Identity": 2, "Scene Understanding": 1, "Action Recognition": 10}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures' questions of one type, one of another, one about a video."""
    rows = [
        {"question_id": name, "question_type_id": type_id, "data_type": "image" if type_id < 10 else "video", "answer": answer}
        for name, type_id, answer in (("5", 1, "A"), ("6", 1, "B"), ("7", 2, "C"), ("v0", 10, "D"))
    ]
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"question_type": TYPES, "questions": rows}))
    return tmp_path


def _answers(texts: Iterable[str], names: tuple = (5, 6, 7, "v0")) -> list[dict]:
    return [{"question_id": name, "prompt": "q", "text": text} for name, text in zip(names, texts, strict=True)]


def _parts(scores: dict[str, float], found: dict[str, float]) -> None:
    other = {"Total accuracy": "total", "image accuracy": "image", "video accuracy": "video"}
    for name, percent in scores.items():
        assert round(found[other.get(name, f"type.{name}")], 2) == percent


def test_equals_the_official_code(official: Path, tmp_path: Path, write_lines: Callable) -> None:
    """Every verdict, printed percentage and line of the upload of the recorded run, and the run with answers missing."""
    data = official / "scorers" / "seed_bench"
    expected = json.loads((data / "expected.json").read_text())
    answers = SEED.read(data / "answers.jsonl")
    found = SEED.score(data, answers)
    _parts(expected["scores"], dict(found.figures))
    right = sum(expected["per_question"].values())
    assert found.figures["total"] == pytest.approx(right / len(expected["per_question"]) * 100, rel=1e-9)
    assert {str(row["question_id"]): row["score"] for row in found.questions} == expected["per_question"]
    assert [warning.split(" (")[0] for warning in found.warnings] == ["the official rule takes 41 answers"]
    (path,) = SEED.upload(data, answers, tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        json.loads(line) for line in (data / "expected_upload.jsonl").read_text().splitlines()
    ]
    assert SEED.score(data, SEED.read(path)).figures == found.figures
    fewer = SEED.read(write_lines("fewer.jsonl", [answer.fields for answer in answers.rows[:-7]]))
    _parts(expected["without_the_last_7_answers"]["scores"], dict(SEED.score(data, fewer).figures))


def test_figures_of_a_small_one(data: Path, write_lines: Callable) -> None:
    """Letters must be equal, and types come in the order of their numbers."""
    found = SEED.score(data, SEED.read(write_lines("answers.jsonl", _answers(["A", "b", "C.", "D"]))))
    assert found.figures == {
        "total": 50.0,
        "image": pytest.approx(100 / 3),
        "video": 100.0,
        "type.Scene Understanding": 50.0,
        "type.Instance Identity": 0.0,
        "type.Action Recognition": 100.0,
    }
    assert list(found.figures)[3:] == ["type.Scene Understanding", "type.Instance Identity", "type.Action Recognition"]
    assert found.warnings == [
        "every answer of Instance Identity is wrong, so its figure is 0 here; the official code stops with KeyError",
        "the official rule takes 2 answers (6: 'b', 7: 'C.') for something else than they say: total is 50.0000 by the rule, "
        "and 100.0000 by what they say",
    ]


def test_ids_of_either_type(data: Path, write_lines: Callable) -> None:
    """Ids written as text find their questions; the official code finds none of them and says so nowhere."""
    found = SEED.score(data, SEED.read(write_lines("answers.jsonl", _answers("ABCD", ("5", "6", 7, "v0")))))
    assert found.figures["total"] == 100
    assert found.warnings == [
        "written as text in the answers, where the official code finds numbers only: 2 ids (5, 6); "
        "here total is 100.0000, the official code gives 50.0000"
    ]


def test_missing_and_strange_answers(data: Path, tmp_path: Path, write_lines: Callable) -> None:
    """Missing ones are wrong and refused in an upload; strange ones count nowhere; the last of two counts."""
    rows = [*_answers("BBC", (5, 6, 7)), *_answers("AA", (5, 99))]
    answers = SEED.read(write_lines("answers.jsonl", rows))
    found = SEED.score(data, answers)
    assert found.figures["total"] == 75
    assert "without an answer: 1 question (v0)" in found.warnings[0]
    assert "1 answer (99) to no question of SEED-Bench.json" in found.warnings[1]
    with pytest.raises(UserError, match=r"without an answer: 1 question \(v0\)"):
        SEED.upload(data, answers, tmp_path / "out")


def test_lines_of_the_leaderboard(data: Path, write_lines: Callable) -> None:
    """Its predictions are scored as the answers that they were, and a broken line is named."""
    rows = [{"question_id": name, "prediction": text} for name, text in zip(("5", "6", "7", "v0"), "ABDD", strict=True)]
    found = SEED.score(data, SEED.read(write_lines("predictions.jsonl", rows)))
    assert found.figures["total"] == 75
    assert len(found.warnings) == 0
    with pytest.raises(UserError, match="line 5 of"):
        SEED.score(data, SEED.read(write_lines("predictions.jsonl", [*rows, {"prediction": 3}])))


def test_only_pictures(data: Path, write_lines: Callable) -> None:
    """Without a video question there is no figure of them, where the official code divides by zero."""
    whole = json.loads((data / "SEED-Bench.json").read_text())
    (data / "SEED-Bench.json").write_text(json.dumps({**whole, "questions": whole["questions"][:3]}))
    found = SEED.score(data, SEED.read(write_lines("answers.jsonl", _answers("ABC", (5, 6, 7)))))
    assert found.figures["image"] == found.figures["total"] == 100
    assert "video" not in found.figures
    assert "ZeroDivisionError" in found.warnings[0]


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        ({"questions": []}, "no questions or no question_type"),
        ({"question_type": TYPES, "questions": [{"question_id": "1"}]}, "question 1 has no 'answer'"),
        (
            {"question_type": TYPES, "questions": [{"question_id": [], "answer": "A", "data_type": "image", "question_type_id": 1}]},
            "question 1",
        ),
    ],
)
def test_a_damaged_question_file(data: Path, write_lines: Callable, whole: dict, said: str) -> None:
    """What it lacks is named."""
    (data / "SEED-Bench.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=said):
        SEED.score(data, SEED.read(write_lines("answers.jsonl", _answers("ABCD"))))
