"""Answers files: lines that are none, and answers that find their questions by id."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.answers import read_answers
from fastllava.evaluate.matching import answered_twice, key, latest, listed


def test_lines_that_are_no_answer(tmp_path: Path) -> None:
    """They are counted and named; the others keep their places; empty lines and a byte order mark are nothing."""
    path = tmp_path / "answers.jsonl"
    lines = [
        '{"question_id": 1, "text": "a"}',
        "",
        "{",
        '{"question_id": 2}',
        '{"question_id": [], "text": "a"}',
        '{"question_id": 3, "text": 4}',
        '{"question_id": true, "text": "a"}',
    ]
    lines += ['{"question_id": 5, "text": "\\ud800"}', "[" * 5000, '{"question_id": "6", "text": "b", "prompt": "p", "round_id": 1}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = read_answers(path)
    assert [(row.line, row.id, row.prompt, row.text) for row in found.rows] == [(0, 1, "", "a"), (8, "6", "p", "b")]
    assert found.rows[1].fields["round_id"] == 1
    assert found.broken == [3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(UserError, match=r"line 3 of .* is no answer \(nor are 6 more\)"):
        found.whole()


@pytest.mark.parametrize(("content", "said"), [(b"", "holds no answer"), (b"\n{}\n", "holds no answer"), (b"\xff", "no UTF-8")])
def test_files_without_answers(tmp_path: Path, content: bytes, said: str) -> None:
    """Each is an error that names the file."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_answers(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_answers(tmp_path / "none.jsonl")


def test_ids_are_compared_by_what_they_say(write_lines: Callable) -> None:
    """Digits are a number however they are written; the last of two answers counts."""
    assert [key(name) for name in (7, "7", "-7", "007", "v7", "7.0", "\u0667", "", "1" * 30)] == [
        7,
        7,
        -7,
        7,
        "v7",
        "7.0",
        "\u0667",
        "",
        "1" * 30,
    ]
    rows = read_answers(
        write_lines("answers.jsonl", [{"question_id": name, "text": str(at)} for at, name in enumerate((7, "v", "7"))])
    ).rows
    assert {name: answer.text for name, answer in latest(rows).items()} == {7: "2", "v": "1"}
    assert answered_twice(rows) == ["7"]


def test_names_in_messages() -> None:
    """Three of them, shortened, and never what cannot be written."""
    assert listed([1], "question") == "1 question (1)"
    assert listed(["a" * 99, "\ud800", "3\n4", 4, 5], "row") == f"5 rows ({'a' * 60}, \\ud800, 3 4 and 2 more)"
