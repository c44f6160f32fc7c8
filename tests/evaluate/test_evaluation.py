"""`eval` goes through the benchmarks: what is missing or fails is said and the others still run, and scores.json keeps what is known."""

import json

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Benchmark, Missing, Score, ServerScored
from fastllava.evaluate.evaluation import evaluate
from fastllava.evaluate.questions import Question

ABOUT = {"checkpoint": "run", "template": "v1"}


class Colours(Benchmark):
    """Right is whatever says red."""

    name, title, folder = "colours", "Colours", "colours"
    max_new_tokens, headline, published, unit = 8, "accuracy", {"7b": 50.0}, 100.0
    source = "draw them"

    def questions(self, data):
        return [Question(line, "Which?", None, "Which?") for line in self.need(data / "questions.txt").read_text().splitlines()]

    def score(self, data, answers):
        rows = [{"question_id": row.id, "line": row.line, "score": float(row.text == "red")} for row in answers.rows]
        return Score({"accuracy": sum(row["score"] for row in rows) / len(rows)}, rows, ["one is odd"])


class Served(Colours):
    """Scored by a server, which takes a file."""

    name, title, folder, server = "served", "Served", "served", "https://example.org"

    def score(self, data, answers):
        raise ServerScored("served: the labels are not public; upload the file")

    def upload(self, data, answers, out):
        (out / "upload.json").write_text("[]")
        return [out / "upload.json"]


class Broken(Colours):
    name, title, folder = "broken", "Broken", "broken"

    def score(self, data, answers):
        raise UserError("broken: no label")


@pytest.fixture
def data(tmp_path):
    for name in ("colours", "served", "broken"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "questions.txt").write_text("a\nb\n")
    return tmp_path / "data"


def write(answers):
    def ask(benchmark, questions, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"question_id": q.id, "prompt": q.prompt, "text": text} for q, text in zip(questions, answers, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return ask


def grade(one, folder, answers):
    return one.score(folder, answers)


def run(chosen, data, out, answers=("red", "blue"), about=ABOUT):
    said = []
    return evaluate(chosen, data, out, about, write(answers), grade, said.append), said


def test_every_benchmark_gets_what_it_can(data, tmp_path):
    class Absent(Colours):
        name, title, folder = "absent", "Absent", "absent"

    outcomes, said = run([Colours(), Served(), Absent(), Broken()], data, tmp_path / "out")
    assert [one.status for one in outcomes] == ["scored", "answered", "missing", "failed"]
    assert outcomes[0].value == 50.0
    assert "draw them" in outcomes[2].words
    held = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {"checkpoint": held["checkpoint"], "template": held["template"]} == ABOUT
    assert held["benchmarks"]["colours"]["figures"] == {"accuracy": 0.5}
    assert held["benchmarks"]["colours"]["value"] == 50.0
    assert held["benchmarks"]["served"]["uploads"] == [str(tmp_path / "out" / "uploads" / "served" / "upload.json")]
    assert [path.name for path in (tmp_path / "out" / "uploads").iterdir()] == ["served"]
    assert any("warning: one is odd" in line for line in said)
    assert any("broken: no label" in line for line in said)


def test_a_refused_upload_does_not_cost_the_score(data, tmp_path):
    class Refused(Colours):
        def upload(self, data, answers, out):
            raise UserError("colours: without an answer: 1 question")

    (one,), said = run([Refused()], data, tmp_path / "out")
    assert (one.status, one.value, one.uploads) == ("scored", 50.0, [])
    assert not (tmp_path / "out" / "uploads").exists()
    assert any("without an answer: 1 question" in line for line in said)


def test_scores_of_an_earlier_call_stay_unless_they_are_of_another_model(data, tmp_path):
    run([Colours()], data, tmp_path / "out")
    run([Served()], data, tmp_path / "out")
    assert set(json.loads((tmp_path / "out" / "scores.json").read_text())["benchmarks"]) == {"colours", "served"}
    with pytest.raises(UserError, match="holds scores with checkpoint 'run', and this is 'other'"):
        run([Colours()], data, tmp_path / "out", about={"checkpoint": "other"})


def test_scores_json_that_is_no_json_is_named(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.json").write_text("{")
    with pytest.raises(UserError, match=r"scores\.json cannot be read"):
        run([Colours()], data, tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .* cannot be written \(.*\); give another place"):
        run([Colours()], data, tmp_path / "file")


def test_what_is_missing_names_where_it_comes_from(tmp_path):
    with pytest.raises(Missing, match=r"colours: .* is not there; draw them"):
        Colours().questions(tmp_path)
