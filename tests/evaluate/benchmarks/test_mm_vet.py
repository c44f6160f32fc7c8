"""MM-Vet: the official requests, retries, scores and tables, from lists of replies and from published grades."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Missing, Score
from fastllava.evaluate.benchmarks import benchmark
from fastllava.evaluate.benchmarks.mm_vet import MMVet, correctness
from fastllava.evaluate.judge import Ask, Reply, Request, make_judge

VET = MMVet()
CAPABILITIES = (["rec"], ["ocr", "math"], ["math", "ocr"], ["rec", "know"])
PROMPT = "Compare.\n\nQ | A | P | C\n"


@pytest.fixture
def data(tmp_path: Path, write_lines: Callable) -> Path:
    """A small MM-Vet with its answers."""
    meta = {f"v1_{n}": {"question": f"Which {n}?", "answer": "a<AND>b<OR>c", "capability": caps} for n, caps in enumerate(CAPABILITIES)}
    (tmp_path / "mm-vet.json").write_text(json.dumps(meta))
    (tmp_path / "mm-vet_prompt.txt").write_text(PROMPT)
    write_lines("llava-mm-vet.jsonl", [{"question_id": n, "image": f"v1_{n}.png", "text": f"Which {n}?"} for n in range(4)])
    write_lines("answers.jsonl", [{"question_id": n, "text": f"Ours {n}."} for n in range(4)])
    return tmp_path


def _stored(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _grades(*runs: Sequence[float]) -> dict[str, Any]:
    columns = list(zip(*runs, strict=True))
    return {
        f"v1_{n}": {"model": ["gpt-4-0613"] * len(runs), "content": [str(x) for x in own], "score": list(own)}
        for n, own in enumerate(columns)
    }


def _judged(data: Path, *replies: Path, answers: str = "answers.jsonl") -> Score:
    return VET.judged(data, VET.read(data / answers), make_judge(replies, None, None, data / "kept"))


class _Recorded:
    """A judge that reads requests and says the replies of a list in their order."""

    reads = True
    abreast = 1

    def __init__(self, replies: Sequence[str]) -> None:
        self.replies = iter(replies)
        self.asked: list[Request] = []

    def known(self, benchmark: str) -> Mapping[str, str] | None:
        return None

    def runs(self, benchmark: str, questions: Sequence[int | str]) -> Iterator[Ask]:
        yield self._ask

    def _ask(self, request: Request) -> Reply:
        self.asked.append(request)
        return Reply(next(self.replies), "judge-1", "localhost", "2026-01-02")


def test_equals_the_official_code(official: Path) -> None:
    """Every score of both runs and both tables of the recorded run; sets of capabilities are compared as sets."""
    data = official / "scorers" / "mmvet"
    expected = json.loads((data / "expected.json").read_text())
    score = _judged(data, data / "judge_replies.json")
    assert {row["name"]: row["scores"] for row in score.questions} == expected["scores"]
    names, (_, *cells) = expected["cap_score"][0][1:], expected["cap_score"][1]
    for name, cell in zip(names[:-3], cells, strict=False):
        assert f"{score.figures[f'capability.{name}']:.1f}" == cell, name
    assert (f"{score.figures['total']:.1f}", f"{score.figures['std']:.1f}") == (cells[-3], cells[-2])
    assert str([round(score.figures[f"run{number}.total"], 1) for number in (1, 2)]) == cells[-1]
    names, (_, *cells) = expected["cap_int_score"][0][1:], expected["cap_int_score"][1]
    ours = {frozenset(key.partition(".")[2].split("+")): value for key, value in score.figures.items() if key.startswith("capability_set.")}
    assert len(ours) == len(names) - 3
    for name, cell in zip(names[:-3], cells, strict=False):
        assert f"{ours[frozenset(name.split('_'))]:.1f}" == cell, name


def test_the_upload_is_the_official_converter_s(official: Path, tmp_path: Path) -> None:
    data = official / "scorers" / "mmvet"
    (path,) = VET.upload(data, VET.read(data / "answers.jsonl"), tmp_path / "out")
    assert path.read_bytes() == (data / "expected_results.json").read_bytes()
    assert [(row.id, row.text) for row in VET.read(path).rows] == [(row.id, row.text) for row in VET.read(data / "answers.jsonl").rows]


def test_asks_what_the_official_code_asks(official: Path, tmp_path: Path) -> None:
    data = official / "scorers" / "mmvet"
    expected = json.loads((data / "expected.json").read_text())["request"]
    (tmp_path / "prompt.txt").write_text(PROMPT)
    judge = _Recorded(json.loads((data / "judge_replies.json").read_text()))
    VET.judged(data, VET.read(data / "answers.jsonl"), judge, tmp_path / "prompt.txt")
    first, retry = judge.asked[0], next(one for one in judge.asked if one.attempt == 1)
    assert first.messages == [{"role": "user", "content": f"{PROMPT}\n{expected['last_line_of_first_request']}"}]
    assert retry.messages[0]["content"].split("\n")[-2:] == expected["last_lines_of_first_retry"]
    assert (first.max_tokens, first.temperature, retry.temperature) == (
        expected["max_tokens"],
        expected["temperature"],
        expected["retry_temperature"],
    )


def test_a_request_and_its_retries(data: Path) -> None:
    judge = _Recorded(["0.5", "x", "2", "-1", "no", "1.5", "1.0", "1", "0"])
    score = VET.judged(data, VET.read(data / "answers.jsonl"), judge)
    assert judge.asked[0].messages == [{"role": "user", "content": f"{PROMPT}\nWhich 0? | a <AND> b <OR> c | Ours 0. | "}]
    retries = [one for one in judge.asked if one.question == "v1_1"]
    assert [(one.attempt, one.temperature) for one in retries] == [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (4, 1.5), (5, 2.0)]
    last = "Which 1? | a <AND> b <OR> c | Ours 1. | \nPredict the correctness of the answer (digit): "
    assert {one.messages[0]["content"] for one in retries[1:]} == {f"{PROMPT}\n{last}"}
    assert [row["score"] for row in score.questions] == [0.5, 0.0, 1.0, 0.0], "the sixth reply is not read, as by the official code"
    assert "1 of 4 answers got no number from the judge (v1_1, at last: '1.0')" in score.warnings[0]
    assert "total is 37.5, without them 50.0" in score.warnings[0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("0.7", 0.7),
        ("1", 1.0),
        ("0.9 is", 0.9),
        ("0.9\n", 0.9),
        ("1.1", None),
        ("-0.1", None),
        (" 0.5", None),
        ("", None),
        ("Cor", None),
        ("nan", None),
    ],
)
def test_what_a_reply_says(text: str, score: float | None) -> None:
    assert correctness(text) == score


def test_figures_by_capability_and_by_their_sets(data: Path) -> None:
    score = _judged(data, _stored(data / "grades.json", _grades([0.5, 1.0, 0.0, 0.1])))
    assert score.figures == {
        "total": pytest.approx(40.0),
        "capability.rec": pytest.approx(30.0),
        "capability.ocr": 50.0,
        "capability.math": 50.0,
        "capability.know": pytest.approx(10.0),
        "capability_set.rec": 50.0,
        "capability_set.math+ocr": 50.0,
        "capability_set.know+rec": pytest.approx(10.0),
    }
    assert score.judge is not None
    assert score.judge["models"] == ["gpt-4-0613"]


def test_several_runs_give_their_mean_and_each(data: Path) -> None:
    first = _stored(data / "two.json", _grades([0.5] * 4, [0.7] * 4))
    second = _stored(data / "one.json", _grades([0.3] * 4))
    score = _judged(data, first, second)
    assert [score.figures[f"run{number}.total"] for number in (1, 2, 3)] == [pytest.approx(x) for x in (50.0, 70.0, 30.0)]
    assert (score.figures["total"], score.figures["std"]) == (pytest.approx(50.0), pytest.approx(16.3299316))
    assert score.questions[0]["scores"] == [0.5, 0.7, 0.3]
    assert score.warnings == []


def test_replies_of_two_judges_are_warned_of(data: Path) -> None:
    other = json.loads(json.dumps(_grades([0.3] * 4)).replace("gpt-4-0613", "gpt-5"))
    score = _judged(data, _stored(data / "a.json", _grades([0.3] * 4)), _stored(data / "b.json", other))
    assert score.warnings == [
        "replies of different judges are mixed (gpt-4-0613, gpt-5): the figures are of none of them; judge all answers by one"
    ]


def test_grades_need_no_prompt_and_total_no_metadata(data: Path) -> None:
    for name in ("mm-vet.json", "mm-vet_prompt.txt"):
        (data / name).unlink()
    score = _judged(data, _stored(data / "grades.json", _grades([0.5, 1.0, 0.0, 0.1])))
    assert score.figures == {"total": pytest.approx(40.0)}
    assert "no figures by capability" in score.warnings[0]


def test_a_grade_that_its_text_does_not_say(data: Path) -> None:
    grades = _grades([0.5, 1.0, 0.0, 0.1])
    grades["v1_0"]["content"] = ["0.9"]
    grades["v1_2"]["content"] = ["Correct"]
    score = _judged(data, _stored(data / "grades.json", grades))
    assert "1 of 4 answers got no number from the judge (v1_2, at last: 'Correct')" in score.warnings[0]
    assert "1 grades have another score than their content says (v1_0)" in score.warnings[1]


def test_nan_is_no_score(data: Path) -> None:
    """The official code takes it for one, and its total is nan."""
    score = _judged(data, _stored(data / "replies.json", ["nan", "0.5", "0.5", "0.5", "0.5"]))
    assert score.figures["total"] == 50.0
    assert "a reply is nan" in score.warnings[0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda grades: grades.pop("v1_3"), r"no reply for 1 questions \(v1_3\)"),
        (lambda grades: grades.update(v1_9=grades["v1_0"]), r"replies for 1 questions that --data does not ask \(v1_9\)"),
        (lambda grades: grades["v1_1"].update(score=[0.1, 0.2], content=["", ""], model=["", ""]), "has 2 runs of v1_1, but 1 of v1_0"),
        (lambda grades: grades["v1_1"].update(score=[1.2]), r"'v1_1' of .*: score is \[1.2\]"),
        (lambda grades: grades["v1_1"].update(score=[float("nan")]), "'v1_1' of .*: score is"),
        (lambda grades: grades["v1_1"].update(score=0.5), "'v1_1' of .*: score is 0.5"),
        (lambda grades: grades["v1_1"].update(model=[]), "model has no 1 places"),
    ],
)
def test_grades_that_do_not_fit(data: Path, change: Callable, match: str) -> None:
    grades = _grades([0.5] * 4)
    change(grades)
    with pytest.raises(UserError, match=match):
        _judged(data, _stored(data / "grades.json", grades))


def test_a_question_twice_in_the_grades(data: Path) -> None:
    path = data / "grades.json"
    text = json.dumps(_grades([0.5] * 4))
    path.write_text(f'{text[:-1]}, "v1_0": {{"score": [1.0]}}}}')
    with pytest.raises(UserError, match="has the key 'v1_0' twice"):
        _judged(data, path)


def test_missing_and_double_answers(data: Path, write_lines: Callable) -> None:
    """The official converter takes the last; the official evaluator stops with a KeyError where one is missing."""
    write_lines("three.jsonl", [{"question_id": n, "text": ""} for n in range(3)])
    with pytest.raises(UserError, match=r"no answer to 1 of 4 questions \(v1_3\)"):
        _judged(data, _stored(data / "grades.json", _grades([0.5] * 4)), answers="three.jsonl")
    write_lines("double.jsonl", [{"question_id": n, "text": f"{place}"} for place, n in enumerate((0, 1, 2, 3, 0))])
    score = _judged(data, _stored(data / "grades.json", _grades([0.5] * 4)), answers="double.jsonl")
    assert "answers 1 questions more than once" in score.warnings[0]
    assert score.questions[0]["line"] == 4


def test_replies_of_another_benchmark(data: Path, write_lines: Callable) -> None:
    with pytest.raises(UserError, match="holds reviews of LLaVA-Bench, but the benchmark is mm_vet"):
        _judged(data, write_lines("reviews.jsonl", [{"question_id": n, "tuple": [1, 2]} for n in range(4)]))
    with pytest.raises(UserError, match="holds a text for each question, as the answers for MM-Vet's judge do"):
        _judged(data, _stored(data / "results.json", {f"v1_{n}": "Ours" for n in range(4)}))


SCRIPT = 'import os\n\nprompt = """{}"""\n\n\ndef f(prompt=prompt):\n    prompt = "another"\n    raise SystemExit\n'


@pytest.mark.parametrize("kind", ["py", "ipynb", "txt"])
def test_the_examples_come_from_the_official_file(data: Path, kind: str) -> None:
    """It is read, never run."""
    (data / "mm-vet_prompt.txt").unlink()
    cells = [
        {"cell_type": "markdown", "source": "prompt = 1"},
        {"cell_type": "code", "source": ["!pip install x\n", f'prompt = """{PROMPT}"""\n']},
    ]
    texts = {"py": SCRIPT.format(PROMPT), "ipynb": json.dumps({"cells": cells}), "txt": PROMPT}
    names = {"py": "mm-vet_evaluator.py", "ipynb": "mm-vet_evaluator.ipynb", "txt": "mm-vet_prompt.txt"}
    (data / names[kind]).write_text(texts[kind])
    assert VET.requests(data, VET.read(data / "answers.jsonl"))[0].messages[0]["content"].startswith(f"{PROMPT}\nWhich 0? | ")


@pytest.mark.parametrize("text", ["", "prompt = other()\n", "def f(:\n", "x = 1\0\n", "(" * 5000, "prompt = '   '\n"])
def test_a_script_without_the_examples(data: Path, text: str) -> None:
    (data / "mm-vet_evaluator.py").write_text(text)
    with pytest.raises(UserError, match=r"holds no text for the judge .*; take https://"):
        VET.requests(data, VET.read(data / "answers.jsonl"))


def test_missing_examples_are_named_with_where_they_come_from(data: Path) -> None:
    (data / "mm-vet_prompt.txt").unlink()
    with pytest.raises(
        Missing,
        match=r"mm-vet_evaluator.py are not there; download https://raw.githubusercontent.com/yuweihao/MM-Vet/main/mm-vet_evaluator.py",
    ):
        VET.requests(data, VET.read(data / "answers.jsonl"))


def test_questions_are_the_original_s(data: Path) -> None:
    asked = VET.questions(data)
    assert (asked[1].id, asked[1].text, asked[1].prompt, asked[1].image) == (1, "Which 1?", "Which 1?", data / "images" / "v1_1.png")
    assert VET.max_new_tokens == 1024


def test_its_name_leads_to_it() -> None:
    assert isinstance(benchmark("mm_vet"), MMVet)
