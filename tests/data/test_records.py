"""Reading JSON as a stream: both forms, every way to break them, and the place that is named."""

import json
import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from fastllava.data import json_window
from fastllava.data import records as module
from fastllava.data.records import read_records
from fastllava.errors import UserError


def read(path: Path, content: bytes) -> list[tuple[int, object]]:
    """(line, value, or the reason against it) of each record."""
    path.write_bytes(content)
    return [(raw.line, raw.value if raw.problem is None else raw.problem.reason) for raw in read_records(path)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "records"


A, B = {"id": "a"}, {"id": "b"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", []),
        (b' \n[ {"id": "a"} ,\n\n {"id":"b"}\n]\n', [(2, A), (4, B)]),
        (b'\xef\xbb\xbf[{"id": "a"}]', [(1, A)]),
        (b'{"id": "a"}\n{"id": "b"}', [(1, A), (2, B)]),
        (b'\n{"id": "a"}\r\n\r\n  {"id": "b"}  \n', [(2, A), (4, B)]),
        (b'\xef\xbb\xbf{"id": "a"}\n', [(1, A)]),
        (b'[1, "x", null, 12]', [(1, 1), (1, "x"), (1, None), (1, 12)]),
        # What is wrong with one record leaves the others alone.
        (b'[{"a": NaN}, {"id": "a"}]', [(1, "json_constant"), (1, A)]),
        (b'[{"a": {"b": 1, "b": 2}}, {"id": "a"}]', [(1, "json_duplicate_key"), (1, A)]),
        (b'{"id": "a"}\n{broken}\n{"id": "b"}', [(1, A), (2, "json_syntax"), (3, B)]),
        (b'{"id": "a"}\n{"id": "\xff"}\n{"id": "b"}', [(1, A), (2, "json_encoding"), (3, B)]),
        (b'{"id": "a"} {"id": "b"}\n{"id": "b"}', [(1, "json_syntax"), (2, B)]),
        (b'{"id": "a"}\n{"n": ' + b"1" * 5000 + b"}\n", [(1, A), (2, "json_syntax")]),
        (b'{"id": ' + b"[" * 100_000 + b'\n{"id": "b"}', [(1, "json_too_deep"), (2, B)]),
        # Deep, if not too deep for the decoder; a text of brackets is not.
        (b'[{"n": ' + b"[" * 60 + b"]" * 60 + b'}, {"id": "a"}]', [(1, "json_too_deep"), (1, A)]),
        (b'{"n": ' + b'{"n": ' * 60 + b"1" + b"}" * 61 + b'\n{"id": "a"}', [(1, "json_too_deep"), (2, A)]),
        (b'{"id": "' + b"[" * 1000 + b'"}', [(1, {"id": "[" * 1000})]),
        (b'{"id": "a"}\n{"id": "b"},\n', [(1, A), (2, "json_syntax")]),
        (b'{"a": Infinity}\n{"a": -Infinity}', [(1, "json_constant"), (2, "json_constant")]),
        (b'{"id": "a"}\n{"id": "unfinished', [(1, A), (2, "json_syntax")]),
    ],
)
def test_both_forms_are_read(file: Path, content: bytes, expected: list) -> None:
    assert read(file, content) == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"hello", "begins with b'h'"),
        (b"\xff\xfe[\x00]\x00", "is UTF-16"),
        (b"\x1f\x8b\x08\x00", "is gzip"),
        (b"[\x00{\x00", "is UTF-16"),
        (b"PAR1\x15", "is Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b'{\n "id": "a"\n}', "an object over several lines"),
        (b'[{"id": "a"}', "line 1: the end of the file after record 0"),
        (b'[{"id": "a"},\n', "line 2: record 1 is broken JSON"),
        (b'[{"id": "a"}\n{"id": "b"}]', r"line 2: '{' after record 0"),
        (b'[{"id": "a"},\n]', "line 2: ',' before ']'|line 1: ',' before ']'"),
        (b'[{"id": "a"}]\n[', r"line 2: '\[' after the end"),
        (b'[\n{"id": x}]', "line 2: record 0 is broken JSON"),
        (b'[\n{"id": "a}]', "line 2: record 0 is broken JSON"),
        (b'[{"id": "\xff"}]', "byte 9 is not UTF-8"),
        (b'[{"id": "\xc3', "is not UTF-8"),
        (b"[" * 100_000, "nested more than 50 deep"),
        (b'{"id": "a"},\n{"id": "b"}', "line 1: ',' after the record; take the commas"),
        (b'[{"id": "a",}]', "record 0 is broken JSON: ',' before '}'; take it out"),
        (b'[{"id": ["a", ]}]', "record 0 is broken JSON: ',' before ']'; take it out"),
        (b"[{'id': 'a'}]", "a single quote; JSON has double ones"),
        (b'[{"id": None}]', "None is Python; JSON writes true, false, null"),
        (b'[{"id": 1}, // two\n{"id": 2}]', "a comment, which JSON does not have"),
        (b"[" + b"1" * 5000 + b"]", "thousands of digits"),
    ],
)
def test_a_broken_file_is_said_with_its_place(file: Path, content: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        read(file, content)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_or_nothing_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"cannot be read .*; give the path"):
            list(read_records(path))


def test_what_never_ends_or_is_read_once_is_refused_at_once(tmp_path: Path) -> None:
    pipe, place = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(place))
    for path, kind in ((pipe, "a pipe"), (Path("/dev/zero"), "a device"), (place, "a socket"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=rf"cannot be read \(is {kind}, not a file\); give the path"):
            list(read_records(path))
    listening.close()


@pytest.mark.parametrize("lines", [True, False])
def test_any_window_reads_the_same(file: Path, monkeypatch: pytest.MonkeyPatch, lines: bool) -> None:
    values = [{"id": i, "text": 'é☃\U0001f600 "\\n' * (i % 7), "n": 10**i, "deep": [{"x": [1.5e-7, True]}]} for i in range(40)]
    text = (
        "\n".join(json.dumps(v, ensure_ascii=i % 2 == 0) for i, v in enumerate(values))
        if lines
        else json.dumps(values, ensure_ascii=False, indent=1)
    )
    for size in (1, 7, 64, 2**20):
        monkeypatch.setattr(json_window, "CHUNK", size)
        assert [value for _, value in read(file, text.encode())] == values


def test_a_record_beyond_the_bound_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", 2**16)
    monkeypatch.setattr(json_window, "CHUNK", 2**10)
    large = b'{"id": "' + b"x" * 2**18 + b'"}'
    little_too_large = b'{"id": "' + b"x" * 2**16 + b'"}'
    assert read(file, b'[{"id": "a"}, ' + little_too_large + b', {"id": "b"}]') == [(1, A), (1, "json_too_large"), (1, B)]
    assert read(file, b'{"id": "a"}\n' + large + b'\n{"id": "b"}') == [(1, A), (2, "json_too_large"), (3, B)]
    with pytest.raises(UserError, match="line 1: record 1 is broken JSON, or larger than"):
        read(file, b'[{"id": "a"}, ' + large + b"]")


def test_memory_does_not_grow_with_the_file(file: Path) -> None:
    record = json.dumps({"id": "x", "text": "word " * 400})
    for text in ("[" + ",".join([record] * 8000) + "]", "\n".join([record] * 8000)):
        file.write_text(text)
        assert file.stat().st_size > 16_000_000
        tracemalloc.start()
        assert sum(1 for _ in read_records(file)) == 8000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8_000_000
