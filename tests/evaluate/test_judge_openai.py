"""A judge behind an address, against a server that speaks its API and fails in every way that servers do."""

import json
import logging
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastllava.errors import UserError
from fastllava.evaluate.judge import Reply, Request, each
from fastllava.evaluate.judge_cache import ReplyCache, digest
from fastllava.evaluate.judge_openai import OpenAIJudge

KEY = "sk-never-to-be-seen-0123456789abcdef"
Handler = BaseHTTPRequestHandler


class Server(ThreadingHTTPServer):
    """It keeps every request, and answers the n-th (from 0) as `answers(handler, n, body)` does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: Callable[[Any, int, dict[str, Any]], None] = lambda handler, n, body: say(handler, completion("8 9"))
        self.counting = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that a test breaks."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.counting:
            number = len(self.server.asked)
            self.server.asked.append({"path": self.path, **body})
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.server.answers(self, number, body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def completion(text: Any, model: Any = "judge-2026") -> bytes:
    return json.dumps({"model": model, "choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def say(handler: Any, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def error(handler: Any, status: int, message: str = "no", code: str | None = None, **headers: str) -> None:
    say(handler, json.dumps({"error": {"message": message, "code": code}}).encode(), status, **headers)


def reset(handler: Any) -> None:
    """Break the connection off with a RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def drip(handler: Any) -> None:
    """A byte now and then, for ever."""
    say(handler, b"", Content_Length="1000000")
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("openai", reason="openai is not installed")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield one
        one.shutdown()


class Pauses(list):
    """Seconds that were to be waited, and are not."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def judge(server: Server, tmp_path: Path, pauses: Pauses) -> Callable[..., OpenAIJudge]:
    def make(model: str = "judge", cache: str = "kept", timeout: float = 5.0, **more: Any) -> OpenAIJudge:
        return OpenAIJudge(model, server.url, tmp_path / cache, timeout=timeout, pause=pauses, **more)

    return make


def request(question: int = 0, run: int = 0, attempt: int = 0) -> Request:
    return Request(question, run, attempt, [{"role": "user", "content": f"Rate {question} ä {attempt}."}], 0.2, 1024)


def asked(judge: OpenAIJudge, count: int = 1) -> list[Reply]:
    """The replies of a judge to `count` questions in its first run."""
    runs = judge.runs("llava_bench", range(count))
    ask = next(runs)
    try:
        return each(range(count), lambda n: ask(request(n)), judge.abreast)
    finally:
        runs.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_server_gets_what_the_official_code_sends_and_nothing_else(
    server: Server, judge: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (reply,) = asked(judge())
    assert server.asked == [
        {
            "path": "/v1/chat/completions",
            "model": "judge",
            "messages": [{"role": "user", "content": "Rate 0 ä 0."}],
            "temperature": 0.2,
            "max_tokens": 1024,
        }
    ]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert reply == Reply("8 9", "judge-2026", f"127.0.0.1:{server.server_port}", datetime.now(UTC).date().isoformat())


def test_a_server_of_ones_own_needs_no_key(server: Server, judge: Callable) -> None:
    asked(judge())
    assert server.headers[0]["authorization"] == "Bearer none"


def test_openai_itself_needs_one(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"api\.openai\.com needs a key; set OPENAI_API_KEY"):
        asked(OpenAIJudge("gpt-4", None, tmp_path / "kept"))


@pytest.mark.parametrize("key", ["sk-\u00e4bcdefghijkl", "sk-abcdef\x01ghijkl"])
def test_a_key_that_is_none(judge: Callable, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a character that no key has") as raised:
        asked(judge())
    assert key not in str(raised.value)


def test_half_a_surrogate_pair_cannot_be_sent(server: Server, judge: Callable) -> None:
    (ask,) = judge().runs("mm_vet", ["v1_7"])
    with pytest.raises(UserError, match="question v1_7: what the judge is sent holds half a surrogate pair"):
        ask(Request("v1_7", 0, 0, [{"role": "user", "content": "\ud800"}], 0.0, 3))
    assert server.asked == []


def test_without_the_package_the_remedy_is_named(judge: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"--judge needs the package openai; install it: pip install 'fastllava\[judge\]'"):
        asked(judge())


PASSING: dict[str, Callable[[Any], None]] = {
    "500": lambda handler: error(handler, 500),
    "502 in HTML": lambda handler: say(handler, b"<html>Bad gateway", 502, Content_Type="text/html"),
    "429": lambda handler: error(handler, 429, Retry_After="2"),
    "408": lambda handler: error(handler, 408),
    "no JSON": lambda handler: say(handler, b'{"choices": [{"mess'),
    "no UTF-8": lambda handler: say(handler, b"\xff\xfe\xfa"),
    "deep JSON": lambda handler: say(handler, b"[" * 100_000),
    "empty": lambda handler: say(handler, b""),
    "wrong schema": lambda handler: say(handler, b'{"text": "8 9"}'),
    "no choice": lambda handler: say(handler, b'{"choices": []}'),
    "a list": lambda handler: say(handler, b"[1]"),
    "content is a number": lambda handler: say(handler, completion(8)),
    "an error with status 200": lambda handler: say(handler, b'{"error": {"message": "overloaded"}}'),
    "reset": reset,
    "cut off": lambda handler: (say(handler, b'{"choices"', Content_Length="5000"), handler.connection.shutdown(socket.SHUT_RDWR)),
}


@pytest.mark.parametrize("failure", PASSING)
def test_a_failure_that_passes_is_tried_again(server: Server, judge: Callable, pauses: Pauses, failure: str) -> None:
    def answers(handler: Any, n: int, body: dict[str, Any]) -> None:
        PASSING[failure](handler) if n < 2 else say(handler, completion("7 8"))

    server.answers = answers
    assert asked(judge())[0].text == "7 8"
    assert len(server.asked) == 3
    assert len(pauses) == 2


@pytest.mark.parametrize("failure", [drip, lambda handler: time.sleep(5)])
def test_a_server_that_does_not_come_to_an_end(server: Server, judge: Callable, failure: Callable) -> None:
    server.answers = lambda handler, n, body: failure(handler) if n == 0 else say(handler, completion("7 8"))
    began = time.monotonic()
    assert asked(judge(timeout=0.3))[0].text == "7 8"
    assert time.monotonic() - began < 3


def test_an_answer_without_end(server: Server, judge: Callable) -> None:
    server.answers = lambda handler, n, body: say(handler, b" " * 5 * 2**20 if n == 0 else completion("7 8"))
    assert asked(judge())[0].text == "7 8"
    assert len(server.asked) == 2


def test_a_server_that_always_fails_is_given_up(server: Server, judge: Callable, pauses: Pauses, tmp_path: Path) -> None:
    server.answers = lambda handler, n, body: error(handler, 503)
    with pytest.raises(UserError, match=r"gave no reply for question 0 in 8 tries \(at last: status 503\); .* goes on from there"):
        asked(judge())
    assert len(server.asked) == 8
    assert len(pauses) == 7, "no pause after the last"
    for number, seconds in enumerate(pauses):
        assert min(60, 2**number) / 2 <= seconds <= min(60, 2**number)
    assert (tmp_path / "kept").read_bytes() == b""


def test_nobody_at_the_address(tmp_path: Path, pauses: Pauses) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"in 8 tries \(at last: no connection: .*refused"):
        asked(OpenAIJudge("judge", url, tmp_path / "kept", pause=pauses))


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("7", 7, 7),
        ("7.5", 7.5, 7.5),
        ("0", 0.5, 1),
        ("-3", 0.5, 1),
        ("nan", 0.5, 1),
        ("inf", 0.5, 1),
        ("soon", 0.5, 1),
        ("", 0.5, 1),
        (300, 200, 300),
        (-300, 0.5, 1),
    ],
)
def test_retry_after_is_honoured(server: Server, judge: Callable, pauses: Pauses, said: str | int, least: float, most: float) -> None:
    """A number is so many seconds from now, said as a date."""
    if isinstance(said, int):
        said = format_datetime(datetime.now(UTC) + timedelta(seconds=said), usegmt=True)
    server.answers = lambda handler, n, body: error(handler, 429, Retry_After=said) if n == 0 else say(handler, completion("7 8"))
    asked(judge())
    assert len(pauses) == 1
    assert least <= pauses[0] <= most


def test_a_server_that_asks_for_hours_is_not_waited_for(server: Server, judge: Callable, pauses: Pauses) -> None:
    server.answers = lambda handler, n, body: error(handler, 429, Retry_After="7200")
    with pytest.raises(UserError, match=r"asks to wait 7,200 s \(status 429\); run the same command then"):
        asked(judge())
    assert pauses == []


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (401, None, "asks for a key, and OPENAI_API_KEY is not set"),
        (403, None, "asks for a key"),
        (404, None, "knows no model judge, or no chat completions below that URL"),
        (400, None, r"refuses the request \(status 400: Use max_completion_tokens\); give a judge that takes it"),
        (429, "insufficient_quota", "has no credit left"),
    ],
)
def test_a_failure_that_stays_is_said_at_once(server: Server, judge: Callable, status: int, code: str | None, match: str) -> None:
    server.answers = lambda handler, n, body: error(handler, status, "Use max_completion_tokens", code)
    with pytest.raises(UserError, match=match):
        asked(judge(abreast=1), 5)
    assert len(server.asked) == 1


@pytest.mark.parametrize(("content", "text"), [("", ""), (None, ""), ("8 9\n\u0000\u202e", "8 9\n\u0000\u202e")])
def test_a_reply_that_cannot_be_read_is_a_reply(server: Server, judge: Callable, content: Any, text: str) -> None:
    """The official code takes it as one, so it is neither asked for again nor changed."""
    server.answers = lambda handler, n, body: say(handler, completion(content))
    assert asked(judge())[0].text == text
    assert asked(judge())[0].text == text
    assert len(server.asked) == 1


def test_replies_are_paid_for_once(server: Server, judge: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    first = asked(judge(), 9)
    assert len(server.asked) == 9
    monkeypatch.setitem(sys.modules, "openai", None)
    assert asked(judge(), 9) == first, "and need no server, key or package"
    assert len(server.asked) == 9


def test_another_model_run_or_request_is_asked(server: Server, judge: Callable) -> None:
    asked(judge())
    asked(judge("another"))
    for run, ask in enumerate(judge(runs=2).runs("mm_vet", [0])):
        ask(request(run=run))
        ask(request(run=run, attempt=1))
    assert len(server.asked) == 1 + 1 + 3


def test_not_more_at_once_than_allowed(server: Server, judge: Callable) -> None:
    now, most, lock = [0], [0], threading.Lock()

    def answers(handler: Any, n: int, body: dict[str, Any]) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        say(handler, completion(body["messages"][0]["content"]))

    server.answers = answers
    assert [reply.text for reply in asked(judge(abreast=3), 20)] == [f"Rate {n} ä 0." for n in range(20)]
    assert 1 < most[0] <= 3


def test_the_key_appears_nowhere(
    server: Server, judge: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    """Not even when the server says it back: in replies, in the model's name, in errors."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server.answers = lambda handler, n, body: say(
        handler, completion(f"8 9 {handler.headers['authorization']}", handler.headers["authorization"])
    )
    said = [repr(asked(judge(), 3))]
    assert "8 9 Bearer ***" in said[0]
    for status in (400, 401, 404, 418, 500):
        server.answers = lambda handler, n, body, status=status: error(handler, status, f"wrong key {handler.headers['authorization']}")
        with pytest.raises(UserError) as raised:
            asked(judge(f"model-{status}"))
        said += [str(raised.value), repr(raised.value.__cause__), repr(vars(raised.value))]
        assert "\n" not in str(raised.value)
    out = capsys.readouterr()
    everything = "".join([*said, caplog.text, out.out, out.err, (tmp_path / "kept").read_text()])
    assert KEY not in everything
    assert KEY[3:] not in everything


def test_progress_is_said(server: Server, judge: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr("fastllava.evaluate.judge_openai._Progress._now", lambda _: next(clock))
    said: list[str] = []
    asked(judge(say=said.append, abreast=1), 5)
    first, *later = said
    assert first.startswith(f"judge at 127.0.0.1:{server.server_port} judges 5 answers; its replies are kept in ")
    assert later == ["judged 2 of 5, about 18 s left", "judged 4 of 5, about 6 s left"]


class TestCache:
    """What is kept of replies."""

    def test_a_cut_last_line_is_taken_away(self, tmp_path: Path) -> None:
        path = tmp_path / "kept"
        cache = ReplyCache(path)
        for n in range(3):
            cache.add(f"key{n}", request(n), "judge", Reply(f"{n} ä\n", "m", "h", "2026-01-02"))
        cache.close()
        whole = path.read_bytes()
        ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
        for cut in sorted({*range(0, len(whole), 25), *ends, *(end - 1 for end in ends)}):
            path.write_bytes(whole[:cut])
            kept = ReplyCache(path)
            assert len(kept) == sum(end <= cut for end in ends)
            kept.add("more", request(), "judge", Reply("x"))
            kept.close()
            again = ReplyCache(path)
            assert again.get("more") == Reply("x")
            assert all(again.get(f"key{n}") == Reply(f"{n} ä\n", "m", "h", "2026-01-02") for n in range(len(kept) - 1))
            again.close()

    @pytest.mark.parametrize(
        "line", [b"{}", b"x", b'{"request": "a"}', b"[1]", b'{"request": [], "reply": "", "model": 1, "address": 1, "date": 1}']
    )
    def test_a_file_of_something_else_is_not_written_to(self, tmp_path: Path, line: bytes) -> None:
        (tmp_path / "kept").write_bytes(line + b"\n")
        with pytest.raises(UserError, match=r"line 1 of .* is no reply of a judge"):
            ReplyCache(tmp_path / "kept")
        assert (tmp_path / "kept").read_bytes() == line + b"\n"

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"the judge's replies cannot be kept in .*; give a folder that can be written"):
            ReplyCache(tmp_path / "file" / "kept")

    def test_two_processes_do_not_write_one_file(self, tmp_path: Path) -> None:
        cache = ReplyCache(tmp_path / "kept")
        code = "import sys; from pathlib import Path; from fastllava.evaluate.judge_cache import ReplyCache; ReplyCache(Path(sys.argv[1]))"
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "kept")], capture_output=True, text=True)
        assert "another process writes the judge's replies" in other.stderr
        cache.close()

    def test_everything_that_is_sent_is_in_the_digest(self) -> None:
        base = request()
        others = [
            Request(0, 1, 0, base.messages, 0.2, 1024),
            Request(0, 0, 0, [{"role": "system", "content": base.messages[0]["content"]}], 0.2, 1024),
            Request(0, 0, 0, base.messages, 0.3, 1024),
            Request(0, 0, 0, base.messages, 0.2, 3),
            Request(1, 0, 0, base.messages, 0.2, 1024),
        ]
        keys = {digest("m", "h", one) for one in (base, *others)} | {digest("n", "h", base), digest("m", "i", base)}
        assert len(keys) == 8


def test_a_killed_run_goes_on_and_pays_for_the_rest_only(server: Server, tmp_path: Path) -> None:
    """It is killed after 7 of 12 replies; the same run then sends the 5 others."""
    categories = ("conv", "detail", "complex")
    tables = {
        "questions.jsonl": [{"question_id": n, "image": "0.jpg", "category": categories[n % 3], "text": f"Which {n}?"} for n in range(12)],
        "context.jsonl": [{"image": "0.jpg", "caption": "A lamp."}],
        "answers_gpt4.jsonl": [{"question_id": n, "text": f"Theirs {n}."} for n in range(12)],
        "answers.jsonl": [{"question_id": n, "text": f"Ours {n}."} for n in range(12)],
    }
    for name, rows in tables.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = {f"llava_bench_{name}": {"role": "Assistant", "prompt": "Rate."} for name in categories}
    (tmp_path / "rule.json").write_text(json.dumps(rules))
    free = threading.Event()

    def answers(handler: Any, n: int, body: dict[str, Any]) -> None:
        if n >= 7:
            free.wait(60)
        say(handler, completion("8 6"))

    server.answers = answers
    kept = tmp_path / "answers.jsonl.judge"
    code = (
        "import sys; from pathlib import Path; from fastllava.evaluate.benchmarks.llava_bench import LlavaBench\n"
        "from fastllava.evaluate.judge import make_judge; data = Path(sys.argv[1]); bench = LlavaBench()\n"
        "judge = make_judge([], 'judge', sys.argv[2], data / 'answers.jsonl.judge')\n"
        "score = bench.judged(data, bench.read(data / 'answers.jsonl'), judge); print(score.figures['all'], score.judge['note'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), server.url]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        until = time.monotonic() + 60
        while not kept.exists() or kept.read_bytes().count(b"\n") < 7:
            assert time.monotonic() < until
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    with kept.open("ab") as file:
        file.write(b'{"request": "cut of')
    paid = [one["messages"][1]["content"] for one in server.asked[:7]]
    before = len(server.asked)
    free.set()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rest = [one["messages"][1]["content"] for one in server.asked[before:]]
    assert len(rest) == 5
    assert not set(rest) & set(paid)
    assert done.stdout.startswith(f"75.0 judged by judge-2026 at 127.0.0.1:{server.server_port} on 20")
