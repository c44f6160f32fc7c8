"""MMBench and its Chinese twin: official figures and sheets, rotations, and choices that read as missing."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from openpyxl import Workbook, load_workbook

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Missing
from fastllava.evaluate.benchmarks import benchmark
from fastllava.evaluate.questions import image_bytes

MMBENCH, CN = benchmark("mmbench"), benchmark("mmbench_cn")
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment", "split"]
PICTURE = base64.b64encode(b"picture").decode()


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., Path]:
    """Write a table of rows (index, hint, choices between bars, answer) into tmp_path."""

    def write(*rows: tuple[int, str, str, str], file: str = "mmbench_dev_20230712.tsv") -> Path:
        lines = ["\t".join(COLUMNS)]
        for index, hint, choices, answer in rows:
            cells = [
                str(index),
                f"Which {index}?",
                hint,
                *(choices.split("|") + [""] * 4)[:4],
                answer,
                "color",
                PICTURE,
                "made",
                "",
                "",
                "dev",
            ]
            lines.append("\t".join(cells))
        (tmp_path / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path

    return write


def _answers(**said: str) -> list[dict]:
    return [{"question_id": int(name[1:]), "prompt": "q", "text": text, "round_id": 0} for name, text in said.items()]


PAIR = ((7, "", "red|blue", "A"), (1_000_007, "", "blue|red", "B"), (8, "NA", "x|y|z|w", "D"))


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_equals_the_official_code(official: Path, tmp_path: Path, name: str) -> None:
    """Circular accuracy, the verdict of every question, and every cell of the sheet; the sheet scored again is the same."""
    one, data = benchmark(name), official / "scorers" / name
    expected = json.loads((data / "expected.json").read_text())
    upload = json.loads((data / "expected_upload.json").read_text())
    answers = one.read(data / "answers.jsonl")
    found = one.score(data, answers)
    assert found.figures["circular_accuracy"] == pytest.approx(expected["letter_equality_circular"], rel=1e-9)
    assert {str(row["question_id"]): row["score"] for row in found.questions} == expected["letter_equality_per_group"]
    (path,) = one.upload(data, answers, tmp_path / "out")
    assert [list(row) for row in load_workbook(path).worksheets[0].values] == [upload["header"], *upload["rows"]]
    again = one.score(data, one.read(path))
    assert again.figures == found.figures
    (tmp_path / "empty").mkdir()
    assert one.score(tmp_path / "empty", one.read(path)).figures == found.figures


def test_all_rotations_must_be_right(write_table: Callable, write_lines: Callable) -> None:
    """A question counts when each of its rows has its letter; without rotation each row of index below a million counts."""
    data = write_table(*PAIR)
    found = MMBENCH.score(data, MMBENCH.read(write_lines("a.jsonl", _answers(q7="A", q1000007="A", q8="D"))))
    assert found.figures == {"circular_accuracy": 0.5, "single_pass_accuracy": 1.0}
    assert found.questions == [
        {"question_id": 7, "line": 1, "score": 0.0, "category": "color", "rows": {"7": 1, "1000007": 0}},
        {"question_id": 8, "line": 2, "score": 1.0, "category": "color", "rows": {"8": 1}},
    ]
    assert not found.warnings
    found = MMBENCH.score(data, MMBENCH.read(write_lines("b.jsonl", _answers(q7="A", q8="D.", q9="A"))))
    assert found.figures == {"circular_accuracy": 0.0, "single_pass_accuracy": 0.5}
    assert [warning.split(";")[0] for warning in found.warnings] == [
        "the official rule takes 1 answer (8: 'D.') for something else than they say: circular_accuracy is 0.0000 by the rule, "
        "and 0.5000 by what they say",
        "without an answer: 1 row (1000007)",
        "1 answer (9) to no row of the table, counted nowhere",
    ]


def test_prompts_and_choices(write_table: Callable) -> None:
    """A hint stands in front, choices end at the first missing one, and digits are asked as they stand."""
    data = write_table(
        (1, "A hint.", "red|blue", "A"), (2, "nan", "red|None|blue|x", "C"), (3, "NONE", "none", "A"), (4, "", "1|2.50", "B")
    )
    one, two, three, four = MMBENCH.questions(data)
    assert one.prompt == "A hint.\nWhich 1?\nA. red\nB. blue"
    assert one.text == one.prompt + "\nAnswer with the option's letter from the given choices directly."
    assert one.fields == {"round_id": 0, "options": ["red", "blue"], "option_char": ["A", "B"]}
    assert image_bytes(one) == b"picture"
    assert (two.prompt, three.prompt, four.prompt) == ("Which 2?\nA. red", "Which 3?", "Which 4?\nA. 1\nB. 2.50")
    write_table((1, "", "红|蓝", "A"), file="mmbench_dev_cn_20231003.tsv")
    assert CN.questions(data)[0].text == "Which 1?\nA. 红\nB. 蓝\n请直接回答选项字母。"


def test_lost_choices_are_named(write_table: Callable, write_lines: Callable) -> None:
    """The figure is the official one; the warning says which rows, and what the others give."""
    data = write_table(*PAIR, (9, "", "red|N/A|blue", "C"))
    found = MMBENCH.score(data, MMBENCH.read(write_lines("a.jsonl", _answers(q7="A", q1000007="B", q8="D", q9="A"))))
    assert found.figures["circular_accuracy"] == pytest.approx(2 / 3)
    (warning,) = found.warnings
    assert warning.startswith("choices are lost in 1 row (9: BC), as a cell of None, NA, nan or the like is missing")
    assert warning.endswith("the right one is lost in 1. circular_accuracy is 0.6667, and 1.0000 without the 1 concerned")


def test_rounds_and_ids_of_another_type(write_table: Callable, write_lines: Callable, tmp_path: Path) -> None:
    """Answers of --all-rounds do not overwrite those of the first round, and ids written as text find their rows."""
    data = write_table(*PAIR)
    rows = _answers(q7="A", q1000007="B", q8="D")
    rows = [rows[0], {**rows[0], "text": "B", "round_id": 1}, rows[1], {**rows[2], "question_id": "8"}]
    answers = MMBENCH.read(write_lines("a.jsonl", rows))
    found = MMBENCH.score(data, answers)
    assert found.figures["circular_accuracy"] == 1
    assert "Here circular_accuracy is 1.0000, the official code's sheet gives 0.0000" in found.warnings[0]
    (path,) = MMBENCH.upload(data, answers, tmp_path / "out")
    assert [row[6] for row in load_workbook(path).worksheets[0].values] == ["prediction", "A", "B", "D"]


def test_the_sheet(write_table: Callable, write_lines: Callable, tmp_path: Path) -> None:
    """Numbers of a column of numbers, empty cells for what is missing, and no formula."""
    data = write_table((1, "", "1|2.50|x", "A"), (2, "", "3||NA", "B"))
    (path,) = MMBENCH.upload(data, MMBENCH.read(write_lines("a.jsonl", _answers(q1="=A"))), tmp_path / "out")
    rows = [list(row) for row in load_workbook(path).worksheets[0].values]
    assert rows == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        [1, "Which 1?", 1, 2.5, "x", None, "=A", "A", "dev"],
        [2, "Which 2?", 3, None, None, None, None, "B", "dev"],
    ]
    assert load_workbook(path).worksheets[0]["G2"].data_type == "s"
    with pytest.raises(UserError, match=r"prediction of row 1 .* control character"):
        MMBENCH.upload(data, MMBENCH.read(write_lines("b.jsonl", _answers(q1="A\x01"))), tmp_path / "out")


def test_sheets_from_elsewhere(tmp_path: Path) -> None:
    """A sheet has its labels itself; without a prediction a row is wrong; what is no sheet of predictions is named."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "sheet.xlsx"

    def save(*rows: tuple) -> Path:
        book = Workbook()
        for row in rows:
            book.worksheets[0].append(row)
        book.save(path)
        return path

    answers = MMBENCH.read(save(("index", "prediction", "answer"), (1.0, "A", "A"), (1_000_001, None, "B"), (2, "C", "C")))
    assert MMBENCH.score(tmp_path / "data", answers).figures == {"circular_accuracy": 0.5, "single_pass_accuracy": 1.0}
    with pytest.raises(Missing, match=r"mmbench_dev_20230712\.tsv"):
        MMBENCH.score(tmp_path / "data", MMBENCH.read(save(("index", "prediction"), (1, "A"))))
    with pytest.raises(UserError, match="no column prediction"):
        MMBENCH.read(save(("index", "answer"), (1, "A")))
    with pytest.raises(UserError, match="holds no prediction"):
        MMBENCH.read(save(("index", "prediction")))
    path.write_text("index,prediction")
    with pytest.raises(UserError, match="cannot be read as a spreadsheet"):
        MMBENCH.read(path)


def test_tables_that_cannot_be_scored_or_asked(write_table: Callable, write_lines: Callable, tmp_path: Path) -> None:
    """No labels, no question, no such column, no integer for an index, no file: each is named."""
    data = write_table(*PAIR)
    answers = MMBENCH.read(write_lines("a.jsonl", _answers(q7="A")))
    path = data / "mmbench_dev_20230712.tsv"
    whole = path.read_text()
    for changed, said in (
        (whole.replace("answer", "other", 1), "no column answer; the server"),
        (whole.replace("1000007\t", "seven\t"), "index of row 2 is 'seven'"),
        (whole.split("\n")[0] + "\n", "holds no question"),
    ):
        path.write_text(changed)
        with pytest.raises(UserError, match=said):
            MMBENCH.score(data, answers)
    for changed, said in ((whole.replace("Which 7?", "NA"), "row 1 has no question"), (whole.replace("hint", "tip", 1), "no column hint")):
        path.write_text(changed)
        with pytest.raises(UserError, match=said):
            MMBENCH.questions(data)
    path.unlink()
    with pytest.raises(Missing, match=r"download\.openmmlab\.com"):
        MMBENCH.questions(data)


def test_the_chinese_table_may_lie_in_the_other_folder(write_table: Callable, tmp_path: Path) -> None:
    """The documentation puts it into mmbench, the script reads mmbench_cn."""
    write_table((1, "", "红|蓝", "A"), file="mmbench_dev_cn_20231003.tsv")
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench_dev_cn_20231003.tsv").rename(tmp_path / "mmbench" / "mmbench_dev_cn_20231003.tsv")
    assert len(CN.questions(CN.need(tmp_path / "mmbench_cn"))) == 1
    with pytest.raises(Missing):
        CN.need(tmp_path / "elsewhere" / "mmbench_cn")
