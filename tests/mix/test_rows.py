"""Files of every form are read as rows with their places, and what is wrong with a file is said with its line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastllava.data import json_window
from fastllava.errors import UserError
from fastllava.mix.rows import read_json, read_sections, read_table


def nothing(_: int) -> None:
    """Shows no progress."""


def values(path: Path, under: str | None = None) -> list:
    return [row.value for row in read_table(path, nothing, under)]


@pytest.fixture
def file(tmp_path):
    def make(text: str | bytes, name: str = "rows.json") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def test_every_form_gives_the_same_rows(file, tmp_path):
    rows = [{"a": "x", "b": "1"}, {"a": 'y, "é"\nz', "b": "2"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    forms = [
        file(json.dumps(rows, indent=1)),
        file("\n".join(map(json.dumps, rows)), "rows.jsonl"),
        file('a,b\nx,1\n"y, ""é""\nz",2\n', "rows.csv"),
        file('\ufeffa\tb\nx\t1\n"y, ""é""\nz"\t2\n', "rows.tsv"),
        tmp_path / "rows.parquet",
    ]
    for path in forms:
        assert values(path) == rows, path.name
    assert values(file(json.dumps({"info": {"n": [[[[1]]]]}, "data": rows})), "data") == rows


def test_a_row_knows_its_place(file, tmp_path):
    assert [row.where for row in read_json(file('{\n"1": {"a": 1},\n\n"2": 3}'), nothing)] == [
        f"{tmp_path}/rows.json: line 2, key '1'",
        f"{tmp_path}/rows.json: line 4, key '2'",
    ]
    assert [row.number for row in read_table(file('a\n"x\ny"\nz\n', "rows.csv"), nothing)] == [2, 4]
    pq.write_table(pa.Table.from_pylist([{"a": 1}] * 3), tmp_path / "rows.parquet")
    assert [row.where for row in read_table(tmp_path / "rows.parquet", nothing)][2] == f"{tmp_path}/rows.parquet: row 3"


def test_sections_come_in_the_order_of_the_file_and_others_are_passed_over(file):
    text = json.dumps({"x": {"deep": [{"a": [1, {"b": "c" * 100}]}]}, "annotations": [1, 2], "y": None, "images": [3], "z": "e"}, indent=1)
    for size in (1, 7, 2**20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_window, "CHUNK", size)
            found = [(section, row.value) for section, row in read_sections(file(text), nothing, ("images", "annotations"))]
        assert found == [("annotations", 1), ("annotations", 2), ("images", 3)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with nothing; give a JSON file"),
        ("3", "begins with '3'; give a JSON file"),
        ("{}", "holds no list under 'data' (it holds nothing)"),
        ('{"dat": [], "info": 1}', "holds no list under 'data' (it holds 'dat', 'info')"),
        ('{"data": [1 2]}', "line 1: '2' where ',' or ']' belongs; repair the JSON"),
        ('{"data": [1,]}', "',' before ']'; take it out"),
        ('{"data": [1]', "line 1: the end of the file where ',' or '}' belongs"),
        ('{"data"\n [1]}', "line 2: '[' after the key 'data', where ':' belongs"),
        ("{data: [1]}", "line 1: 'd' where a key in double quotes belongs"),
        ('{"data": [1]} x', "'x' after the end of the JSON; take it out"),
        ('{"data": [{"a": tru}]}', "element 0 is broken JSON"),
        (b"\x1f\x8b\x08\x00", "is gzip, not JSON in UTF-8; unpack it first"),
        (b'{"data": ["\xff"]}', "byte 11 is not UTF-8"),
        ("<html>", "is a web page"),
    ],
)
def test_a_broken_file_is_named_with_its_line(file, text, said):
    with pytest.raises(UserError) as refused:
        values(file(text), "data")
    assert said in str(refused.value)


def test_a_broken_row_does_not_stop_the_file(file):
    rows = list(read_json(file('[{"a": 1, "a": 2}, {"a": NaN}, {"a": 3}]'), nothing))
    assert [row.problem and row.problem.reason for row in rows] == ["json_duplicate_key", "json_constant", None]
    rows = list(read_table(file("a,b\n1\n1,2\n1,2,3\n", "rows.csv"), nothing))
    assert [row.problem is None for row in rows] == [False, True, False]
    rows = list(read_table(file('{"a": 1}\n{"a"\n', "rows.jsonl"), nothing))
    assert [row.problem is None for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "x.csv", "is empty; give a table whose first line names the columns"),
        ("a,a\n1,2\n", "x.csv", "names the column 'a' twice"),
        ('a\n"x', "x.csv", "is no CSV"),
        (b"a\n\xff\n", "x.csv", "is not UTF-8"),
        (b"PAR1 and no more", "x.parquet", "cannot be read as Parquet"),
    ],
)
def test_a_broken_table_is_named(file, text, name, said):
    with pytest.raises(UserError) as refused:
        values(file(text, name))
    assert said in str(refused.value)


def test_progress_reaches_the_size_of_the_file(file):
    path = file(json.dumps([{"a": "x" * 1000}] * 500))
    read: list[int] = []
    for _ in read_json(path, read.append):
        pass
    assert sum(read) == path.stat().st_size
