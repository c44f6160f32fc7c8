"""What stands for a judge, files of stored replies that are none, and work that is done several at a time."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.judge import Reply, each, judging, make_judge


@pytest.mark.parametrize(
    ("replies", "model", "url", "runs", "match"),
    [
        ([], None, None, 1, "a judge is needed: give --replies FILE .* or --judge MODEL"),
        ([Path("a")], "m", None, 1, "--replies and --judge exclude each other"),
        ([Path("a")], None, "http://x/v1", 1, "--base-url: stored replies are asked nowhere"),
        ([], None, "http://x/v1", 1, "a judge is needed"),
        ([], "m", None, 0, "the judge cannot judge 0 times"),
        ([], "m", "x/v1", 1, "--base-url is no address of a server"),
        ([], "m", "http://[x/v1", 1, "--base-url is no address of a server"),
        ([], "m", "http://x:port/v1", 1, "--base-url is no address of a server"),
        ([], "m", "file:///etc/passwd", 1, "--base-url is no address of a server"),
        ([], "m", "http://me:secret@x/v1", 1, "--base-url says more than an address; set OPENAI_API_KEY"),
        ([], "m", "http://x/v1?api_key=secret", 1, "--base-url says more than an address"),
        ([Path("not_there.json")], None, None, 1, "not_there.json cannot be read"),
    ],
)
def test_what_is_no_judge(replies: list[Path], model: str | None, url: str | None, runs: int, match: str) -> None:
    with pytest.raises(UserError, match=match) as raised:
        make_judge(replies, model, url, Path("kept"), runs)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"\xff\xfe",
        b"[]",
        b"[[]]",
        b'["a", 1]',
        b'["a", ["b"]]',
        b"{}",
        b"7",
        b"null",
        b'"8 9"',
        b"8 9\n7 7",
        b'{"v1_0": {"content": ["x"]}}',
        b'{"v1_0": "0.5"}',
        b"[" * 100_000,
        b'{"question_id": 0, "tuple": [1, 2]}\n{"question_id":',
        b'{"question_id": 0, "tuple": [1, 2], "tuple": [3, 4]}',
        b'{"question_id": ' + b"1" * 5000 + b', "tuple": [1, 2]}',
        b'{"question_id": 0, "text": "an answer"}\n{"question_id": 1, "text": "an answer"}',
    ],
)
def test_files_that_hold_no_replies(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "replies").write_bytes(content)
    with pytest.raises(UserError, match="--replies: ") as raised:
        make_judge([tmp_path / "replies"], None, None, tmp_path / "kept")
    assert "\n" not in str(raised.value)


def test_stored_replies_need_neither_openai_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "replies.json").write_text(json.dumps(["8 9"]))
    code = (
        "import sys; from pathlib import Path; from fastllava.evaluate.benchmarks import benchmark; benchmark('mm_vet')\n"
        "from fastllava.evaluate.judge import make_judge; make_judge([Path(sys.argv[1])], None, None, Path('kept'))\n"
        "make_judge([], 'm', None, Path('kept')); print(sorted({'openai', 'torch'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "replies.json")], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_days_and_runs_are_said() -> None:
    replies = [Reply("", "m", "h:1", "2026-01-02"), Reply("", "m", "h:1", "2026-01-05")]
    by, warnings = judging(replies, 3, "gpt-4")
    assert by["note"].startswith(
        "judged by m at h:1 from 2026-01-02 to 2026-01-05, mean of 3 runs; compare only with figures of the same judge"
    )
    assert warnings == []
    assert len(judging([*replies, Reply("", "m", "h:2")], 1, "gpt-4")[1]) == 1, "one name at two addresses"


def test_each_keeps_the_order_and_the_limit() -> None:
    at_once, most = [], []
    lock = threading.Lock()

    def work(n: int) -> int:
        with lock:
            at_once.append(n)
            most.append(len(at_once))
        time.sleep(0.002 * (n % 3))
        with lock:
            at_once.remove(n)
        return n * n

    assert each(range(40), work, 3) == [n * n for n in range(40)]
    assert 1 < max(most) <= 3


@pytest.mark.parametrize("abreast", [1, 4])
def test_each_begins_nothing_after_an_error(abreast: int) -> None:
    begun = []

    def work(n: int) -> None:
        begun.append(n)
        time.sleep(0.01)
        raise UserError(f"no {n}")

    with pytest.raises(UserError, match="no 0"):
        each(range(100), work, abreast)
    assert len(begun) <= 2 * abreast
