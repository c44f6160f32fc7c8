"""LLaVA-Bench: the official requests, pairs and figures, from lists of replies and from published reviews."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import JudgeNeeded, Missing, Score
from fastllava.evaluate.benchmarks import benchmark
from fastllava.evaluate.benchmarks.llava_bench import FAILED, LlavaBench, pair_of
from fastllava.evaluate.judge import Request, make_judge

BENCH = LlavaBench()
CATEGORIES = ("conv", "detail", "complex", "conv")
REPLIES = ["8 9\nGood.", "6 3", "5 10", "7 7"]


@pytest.fixture
def data(tmp_path: Path, write_lines: Callable) -> Path:
    """A small LLaVA-Bench with its answers."""
    rows = [{"question_id": n, "image": f"00{n // 2}.jpg", "category": name, "text": f"Which {n}?"} for n, name in enumerate(CATEGORIES)]
    write_lines("questions.jsonl", rows)
    write_lines("context.jsonl", [{"image": "000.jpg", "caption": ["A lamp.", "It is on."]}, {"image": "001.jpg", "caption": "A kettle."}])
    write_lines("answers_gpt4.jsonl", [{"question_id": n, "text": f"Theirs {n}."} for n in range(4)])
    write_lines("answers.jsonl", [_answer(n) for n in range(4)])
    rules = {f"llava_bench_{name}": {"role": "Person", "prompt": f"Judge {name}."} for name in set(CATEGORIES)}
    (tmp_path / "rule.json").write_text(json.dumps({"coding": {}, **rules}))
    return tmp_path


def _answer(n: int) -> dict:
    return {"question_id": n, "prompt": f"Which {n}?", "text": f"Ours {n}.", "answer_id": f"ours-{n}"}


def _stored(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _reviews(pairs: Sequence[Sequence[float]], **more: Any) -> list[dict]:
    return [
        {"id": n + 1, "question_id": n, "answer2_id": f"ours-{n}", "category": f"llava_bench_{CATEGORIES[n]}", "tuple": list(pair)} | more
        for n, pair in enumerate(pairs)
    ]


def _judged(data: Path, *replies: Path, answers: str = "answers.jsonl") -> Score:
    return BENCH.judged(data, BENCH.read(data / answers), make_judge(replies, None, None, data / "kept"))


@pytest.mark.parametrize("replies", ["judge_replies.json", "expected_reviews.jsonl"])
def test_equals_the_official_code(official: Path, replies: str) -> None:
    """Every pair, and each figure as it is printed, of the recorded run."""
    data = official / "scorers" / "llava_bench"
    score = _judged(data, data / replies)
    reviews = [json.loads(line) for line in (data / "expected_reviews.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row["verdict"], row["category"]) for row in score.questions] == [
        (row["question_id"], row["tuple"], row["category"]) for row in reviews
    ]
    printed = json.loads((data / "expected.json").read_text())["scores"]
    assert {name: round(value, 1) for name, value in score.figures.items()} == {
        name.removeprefix("llava_bench_"): row[0] for name, row in printed.items()
    }
    assert "12 of 40 replies do not begin with two numbers" in score.warnings[0]


def test_asks_what_the_official_code_asks(official: Path) -> None:
    data = official / "scorers" / "llava_bench"
    asked = json.loads((data / "expected_requests.json").read_text())
    requests = BENCH.requests(data, BENCH.read(data / "answers.jsonl"))
    assert [one.messages for one in requests] == [
        [{"role": "system", "content": asked["system"]}, {"role": "user", "content": text}] for text in asked["user"]
    ]
    assert {(one.temperature, one.max_tokens) for one in requests} == {(asked["temperature"], asked["max_tokens"])}


def test_a_request_in_full(data: Path) -> None:
    first = BENCH.requests(data, BENCH.read(data / "answers.jsonl"))[0]
    assert first.messages[1]["content"] == (
        "[Context]\nA lamp.\nIt is on.\n\n[Question]\nWhich 0?\n\n[Person 1]\nTheirs 0.\n\n[End of Person 1]\n\n"
        "[Person 2]\nOurs 0.\n\n[End of Person 2]\n\n[System]\nJudge conv.\n\n"
    )
    assert (first.question, first.temperature, first.max_tokens) == (0, 0.2, 1024)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("8 9\nwhy", (8.0, 9.0)),
        ("8,9", (8.0, 9.0)),
        ("8.5 9.", (8.5, 9.0)),
        ("1_0 \t9", (10.0, 9.0)),
        ("8, 9", FAILED),
        ("8  9", FAILED),
        (" 8 9", FAILED),
        ("8 9 ", FAILED),
        ("8", FAILED),
        ("", FAILED),
        ("8/10 9/10", FAILED),
        ("\n8 9", FAILED),
        ("nan 9", FAILED),
        ("8 inf", FAILED),
        ("1e999 9", FAILED),
    ],
)
def test_what_a_reply_says(text: str, pair: tuple[float, float]) -> None:
    assert pair_of(text) == pair


def test_figures_are_of_means_with_three_digits(data: Path) -> None:
    score = _judged(data, _stored(data / "replies.json", ["8 9", "6 3", "3 10", "7 7.001"]))
    assert score.figures == {
        "all": round(29.001 / 4, 3) / 6 * 100,
        "complex": 10 / 3 * 100,
        "conv": round(16.001 / 2, 3) / 7.5 * 100,
        "detail": 50.0,
    }
    # 16.001 / 2 is 8.0005, whose third digit is cut off by one of the two roundings.
    assert score.figures["conv"] != 16.001 / 2 / 7.5 * 100
    assert [row["score"] for row in score.questions] == [0.9, 0.3, 1.0, pytest.approx(0.7001)]
    assert score.warnings == []


def test_failed_replies_go_into_the_means_and_are_warned_of(data: Path) -> None:
    score = _judged(data, _stored(data / "replies.json", ["8 9", "8, 9", "5 10", "7 7"]))
    assert score.figures["all"] == 6.25 / 4.75 * 100
    assert score.figures["detail"] == 100.0, "as -1 / -1"
    assert score.questions[1]["verdict"] == [-1.0, -1.0]
    assert len(score.warnings) == 1
    assert "1 of 4 replies do not begin with two numbers (question 1: '8, 9')" in score.warnings[0]
    assert "`all` is 131.6, without them 130.0" in score.warnings[0]


def test_all_replies_failed_is_said(data: Path) -> None:
    score = _judged(data, _stored(data / "replies.json", ["no"] * 4))
    assert score.figures["all"] == 100.0
    assert "without them there would be none" in score.warnings[0]


def test_a_reference_of_zero_gives_no_figure(data: Path) -> None:
    with pytest.raises(UserError, match="mean for the reference is 0 over all"):
        _judged(data, _stored(data / "replies.json", ["0 9"] * 4))


def test_several_runs_give_their_mean_and_each(data: Path, write_lines: Callable) -> None:
    """A list with two runs, and a file of reviews: three runs."""
    two = _stored(data / "two.json", REPLIES + ["5 5"] * 4)
    third = write_lines("reviews.jsonl", _reviews([(4, 2)] * 4))
    score = _judged(data, two, third)
    each = [score.figures[f"run{number}.all"] for number in (1, 2, 3)]
    assert each == [pytest.approx(7.25 / 6.5 * 100), 100.0, 50.0]
    assert score.figures["all"] == pytest.approx(sum(each) / 3)
    assert score.questions[0]["verdicts"] == [[8.0, 9.0], [5.0, 5.0], [4.0, 2.0]]
    assert score.judge is not None
    assert score.judge["runs"] == 3
    assert "mean of 3 runs" in score.judge["note"]


def test_a_list_of_lists_has_a_run_each(data: Path) -> None:
    score = _judged(data, _stored(data / "replies.json", [REPLIES, ["5 5"] * 4]))
    assert score.figures["run2.all"] == 100.0


def test_one_file_with_the_reviews_of_two_runs(data: Path, write_lines: Callable) -> None:
    score = _judged(data, write_lines("reviews.jsonl", _reviews([(4, 2)] * 4) + _reviews([(4, 4)] * 4)))
    assert (score.figures["run1.all"], score.figures["run2.all"], score.figures["all"]) == (50.0, 100.0, 75.0)


def test_reviews_need_nothing_but_themselves(tmp_path: Path, write_lines: Callable) -> None:
    """Published reviews are scored in a folder without questions, context and rules."""
    write_lines("answers.jsonl", [_answer(n) for n in range(4)])
    score = _judged(tmp_path, write_lines("reviews.jsonl", _reviews([(8, 9), (6, 3), (5, 10), (7, 7)])))
    assert score.figures == {"all": 7.25 / 6.5 * 100, "complex": 200.0, "conv": 8 / 7.5 * 100, "detail": 50.0}


def test_a_tuple_that_the_text_does_not_say(data: Path, write_lines: Callable) -> None:
    reviews = _reviews([(8, 9), (6, 3), (5, 10), (7, 7)])
    reviews[0]["content"] = "8 1\nBad."
    score = _judged(data, write_lines("reviews.jsonl", reviews))
    assert score.figures["all"] == 7.25 / 6.5 * 100
    assert "1 reviews have another tuple than their content says (question 0)" in score.warnings[0]
    assert "`all` is 111.5, by content it would be 80.8" in score.warnings[0]


def test_reviews_of_other_answers_are_warned_of(data: Path, write_lines: Callable) -> None:
    score = _judged(data, write_lines("reviews.jsonl", _reviews([(4, 2)] * 4, answer2_id="another")))
    assert "4 reviews are of other answers" in score.warnings[0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows: rows[:3], r"no reply for 1 questions \(3\)"),
        (lambda rows: [*rows, {**rows[0], "question_id": 9}], r"replies for 1 questions that --data does not ask \(9\)"),
        (lambda rows: [*rows, rows[0]], "has 2 reviews of question 0, but fewer of others"),
        (lambda rows: [{**rows[0], "category": "llava_bench_complex"}, *rows[1:]], "question 0 is of category llava_bench_complex"),
        (lambda rows: [{**rows[0], "tuple": [8]}, *rows[1:]], r"line 1 of .*: tuple is \[8\]"),
        (lambda rows: [{**rows[0], "tuple": [8, float("nan")]}, *rows[1:]], "line 1 of .*: tuple is"),
        (lambda rows: [{**rows[0], "tuple": [True, 8]}, *rows[1:]], "line 1 of .*: tuple is"),
        (lambda rows: [{"question_id": 0}, *rows[1:]], "line 1 of .* has neither tuple nor content"),
        (lambda rows: [{"tuple": [1, 2]}, *rows[1:]], "line 1 of .* has no question_id"),
    ],
)
def test_reviews_that_do_not_fit(data: Path, write_lines: Callable, change: Callable, match: str) -> None:
    with pytest.raises(UserError, match=match):
        _judged(data, write_lines("reviews.jsonl", change(_reviews([(4, 2)] * 4))))


@pytest.mark.parametrize("count", [0, 3, 5, 7])
def test_a_list_that_is_no_whole_run(data: Path, count: int) -> None:
    with pytest.raises(UserError, match="--replies: "):
        _judged(data, _stored(data / "replies.json", ["8 9"] * count))


def test_answers_in_another_order_go_to_their_questions(data: Path, write_lines: Callable) -> None:
    """The official code pairs by line: 2 of these answers would be judged as answers to another question."""
    write_lines("shuffled.jsonl", [_answer(n) for n in (0, 2, 1, 3)])
    contents = [one.messages[1]["content"] for one in BENCH.requests(data, BENCH.read(data / "shuffled.jsonl"))]
    assert all(f"Which {n}?" in text and f"Ours {n}." in text for n, text in enumerate(contents))
    score = _judged(data, _stored(data / "replies.json", REPLIES), answers="shuffled.jsonl")
    assert "not in the order of questions.jsonl" in score.warnings[0]
    assert "would have 2 of 4 judged" in score.warnings[0]
    assert [row["line"] for row in score.questions] == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("ids", "match"),
    [((0, 1, 2), r"no answer to 1 of 4 questions \(3\)"), ((0, 1, 1, 2, 3), "answers question 1 more than once")],
)
def test_answers_that_cannot_be_paired(data: Path, write_lines: Callable, ids: Sequence[int], match: str) -> None:
    """The official code would judge the first three, or pair every answer after the second with another question."""
    write_lines("other.jsonl", [_answer(n) for n in ids])
    with pytest.raises(UserError, match=match):
        _judged(data, _stored(data / "replies.json", REPLIES), answers="other.jsonl")


def test_lines_after_the_last_question_are_left_out(data: Path, write_lines: Callable) -> None:
    write_lines("more.jsonl", [_answer(n) for n in (0, 1, 2, 3, 0, 8)])
    score = _judged(data, _stored(data / "replies.json", REPLIES), answers="more.jsonl")
    assert "2 lines after the 4 answers" in score.warnings[0]
    assert len(score.questions) == 4


class _Live:
    """A judge that reads requests, and says the same each time."""

    reads = True
    abreast = 2

    def known(self, benchmark: str) -> Mapping[str, str] | None:
        return None

    def runs(self, benchmark: str, questions: Sequence[int | str]):
        def ask(request: Request):
            from fastllava.evaluate.judge import Reply

            return Reply("4 2", "judge-1", "localhost:80", "2026-01-02")

        yield ask


def test_who_judged_is_part_of_the_score(data: Path) -> None:
    score = BENCH.judged(data, BENCH.read(data / "answers.jsonl"), _Live())
    assert score.judge == {
        "models": ["judge-1"],
        "addresses": ["localhost:80"],
        "dates": ["2026-01-02"],
        "runs": 1,
        "note": "judged by judge-1 at localhost:80 on 2026-01-02; compare only with figures of the same judge "
        "(the published ones are of gpt-4-0314, the mean of three runs)",
    }


def test_reference_answers_in_another_order_go_to_their_questions(data: Path, write_lines: Callable) -> None:
    write_lines("answers_gpt4.jsonl", [{"question_id": n, "text": f"Theirs {n}."} for n in (1, 0, 2, 3)])
    contents = [one.messages[1]["content"] for one in BENCH.requests(data, BENCH.read(data / "answers.jsonl"))]
    assert all(f"Ours {n}." in text and f"Theirs {n}." in text for n, text in enumerate(contents))
    assert "answers_gpt4.jsonl is not in the order" in BENCH.judged(data, BENCH.read(data / "answers.jsonl"), _Live()).warnings[0]
    write_lines("answers_gpt4.jsonl", [{"question_id": n, "text": f"Theirs {n}."} for n in (0, 1, 1, 2, 3)])
    with pytest.raises(UserError, match="answers a question twice"):
        BENCH.requests(data, BENCH.read(data / "answers.jsonl"))


@pytest.mark.parametrize(("category", "figures"), [("", {"all": 50.0}), ("conv", {"all": 50.0, "conv": 50.0})])
def test_reviews_with_a_bare_category_or_none(tmp_path: Path, write_lines: Callable, category: str, figures: dict) -> None:
    write_lines("answers.jsonl", [_answer(n) for n in range(4)])
    reviews = _reviews([(4, 2)] * 4, category=category)
    for row in reviews if not category else ():
        del row["category"]
    assert _judged(tmp_path, write_lines("reviews.jsonl", reviews)).figures == figures


@pytest.mark.parametrize("name", ["questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json"])
def test_a_missing_file_is_named_with_where_it_comes_from(data: Path, name: str) -> None:
    (data / name).unlink()
    with pytest.raises(Missing, match=rf"{name} is not there; .*https://"):
        BENCH.judged(data, BENCH.read(data / "answers.jsonl"), _Live())


def test_the_rules_may_lie_elsewhere(data: Path) -> None:
    elsewhere = (data / "rule.json").rename(data / "other.json")
    assert BENCH.requests(data, BENCH.read(data / "answers.jsonl"), elsewhere)[0].messages[1]["content"].endswith("Judge conv.\n\n")


def test_a_rule_file_without_the_category(data: Path) -> None:
    (data / "rule.json").write_text(json.dumps({"llava_bench_conv": {"role": "A", "prompt": "B"}}))
    with pytest.raises(UserError, match="has no rule llava_bench_detail; take the file at https://"):
        BENCH.requests(data, BENCH.read(data / "answers.jsonl"))


def test_there_is_no_figure_without_a_judge(data: Path) -> None:
    with pytest.raises(JudgeNeeded, match=r"--replies FILE .* or --judge MODEL"):
        BENCH.score(data, BENCH.read(data / "answers.jsonl"))


def test_questions_are_the_original_s(data: Path) -> None:
    asked = BENCH.questions(data)
    assert (asked[1].id, asked[1].text, asked[1].prompt, asked[1].image) == (1, "Which 1?", "Which 1?", data / "images" / "000.jpg")
    assert BENCH.max_new_tokens == 1024


def test_its_name_leads_to_it() -> None:
    assert isinstance(benchmark("llava_bench"), LlavaBench)
