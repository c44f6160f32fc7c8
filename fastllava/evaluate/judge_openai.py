"""A judge behind an address that speaks OpenAI's chat completions, asked through the `openai` package.

The key is the environment's OPENAI_API_KEY. It goes to that address and nowhere else: no message, file or reply holds it.
"""

import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastllava.console.masking import MASK, masked
from fastllava.console.printable import printable, shortened
from fastllava.errors import UserError
from fastllava.evaluate.judge import Ask, Reply, Request
from fastllava.evaluate.judge_cache import ReplyCache, digest

KEY = "OPENAI_API_KEY"
_DEFAULT = "https://api.openai.com/v1"
_TRIES = 8
_LONGEST_PAUSE = 60.0
"""Seconds between two tries, where the server does not ask for more."""
_LONGEST_ASKED = 600.0
"""Seconds that a server may ask to be left alone."""
_LARGEST = 4 * 2**20
"""Bytes of an answer of the server; the longest reply that is asked for has 1024 tokens."""
_TRANSPORT = ("httpx", "httpcore", "h11", "h2")
"""Beginnings of the names of the packages that carry requests."""
_SHORTEST_KEY = 8
"""Characters of a key that is masked in replies: servers of one's own take any, such as `none`."""


class _Again(Exception):
    """A try that failed in a way that the next one may not; `after` are the seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class OpenAIJudge:
    """The model `model` of the server at `base_url`, by default OpenAI's or what OPENAI_BASE_URL says."""

    reads = True

    def __init__(
        self,
        model: str,
        base_url: str | None,
        cache: Path,
        runs: int = 1,
        say: Callable[[str], None] | None = None,
        *,
        abreast: int = 4,
        timeout: float = 300.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is asked yet. `timeout`: seconds for one try; `pause` waits between tries.

        Raises UserError for an address that cannot be one, or that holds a password: keys come from the environment only.
        """
        self._model = model
        self._url = base_url or os.environ.get("OPENAI_BASE_URL") or _DEFAULT
        self._address = _host(self._url)
        self._own_server = self._url != _DEFAULT
        self._cache_path = cache
        self._runs = runs
        self._say = say
        self.abreast = abreast
        self._timeout = timeout
        self._pause = pause
        self._key = os.environ.get(KEY, "").strip()
        self._client: Any = None
        self._connecting = threading.Lock()

    def known(self, benchmark: str) -> Mapping[str, str] | None:
        """Nothing: a model judges whatever it is asked."""
        return None

    def runs(self, benchmark: str, questions: Sequence[int | str]) -> Iterator[Ask]:
        """Give one Ask for each run. Replies that were paid for come from the file of replies."""
        cache = ReplyCache(self._cache_path)
        if self._say is not None:
            often = "" if self._runs == 1 else f" {self._runs} times"
            kept = f"{self._cache_path} ({len(cache):,} there)"
            self._say(f"{self._model} at {self._address} judges {len(questions):,} answers{often}; its replies are kept in {kept}")
        progress = _Progress(len(questions) * self._runs, self._say)
        try:
            for _ in range(self._runs):
                yield partial(self._reply, cache, progress)
        finally:
            cache.close()

    def _reply(self, cache: ReplyCache, progress: "_Progress", request: Request) -> Reply:
        key = digest(self._model, self._address, request)
        reply = cache.get(key)
        if reply is None:
            reply = self._asked(request)
            cache.add(key, request, self._model, reply)
            progress.step(request, paid=True)
        else:
            progress.step(request, paid=False)
        return reply

    def _asked(self, request: Request) -> Reply:
        try:
            "".join(one["content"] for one in request.messages).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"question {request.question}: what the judge is sent holds half a surrogate pair, which cannot be sent; mend the text"
            ) from None
        client = self._connected()
        for number in range(_TRIES):
            try:
                return _within(self._timeout, partial(self._try, client, request))
            except _Again as failed:
                reason, after = str(failed), failed.after
            if after > _LONGEST_ASKED:
                raise UserError(
                    f"--judge: {self._address} asks to wait {after:,.0f} s ({reason}); run the same command then: it goes on from here"
                )
            if number < _TRIES - 1:
                # Drawn, so that requests that failed together do not come back together.
                self._pause(max(after, min(_LONGEST_PAUSE, 2.0**number) * random.uniform(0.5, 1.0)))
        raise UserError(
            f"--judge: {self._address} gave no reply for question {request.question} in {_TRIES} tries (at last: {reason}); "
            f"what it replied is in {self._cache_path}, and the same command goes on from there"
        )

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                try:
                    import openai
                except ImportError:
                    raise UserError("--judge needs the package openai; install it: pip install 'fastllava[judge]'") from None
                if not (self._key.isascii() and self._key.isprintable()):
                    raise UserError(f"--judge: {KEY} holds a character that no key has; set it anew")
                if not self._key and not self._own_server:
                    raise UserError(f"--judge: {self._address} needs a key; set {KEY}, or give --base-url for a server of your own")
                # A server of one's own need not ask for a key, but the package does.
                self._client = openai.OpenAI(api_key=self._key or "none", base_url=self._url, max_retries=0, timeout=self._timeout)
            return self._client

    def _try(self, client: Any, request: Request) -> Reply:
        """Send `request` once. Raises _Again, or UserError when another try would say the same."""
        import openai

        messages = [dict(one) for one in request.messages]
        settings = {"model": self._model, "messages": messages, "temperature": request.temperature, "max_tokens": request.max_tokens}
        try:
            with client.chat.completions.with_streaming_response.create(**settings) as response:
                body = b""
                for part in response.iter_bytes():
                    body += part
                    if len(body) > _LARGEST:
                        raise _Again(f"an answer of more than {_LARGEST // 2**20} MiB")
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APITimeoutError:
            raise _Again("no answer in time") from None
        except openai.APIConnectionError as error:
            raise _Again(f"no connection: {self._clean(str(error.__cause__ or error))}") from None
        except Exception as error:
            # What the package's transport raises while the body comes in has no class that all its versions share.
            if isinstance(error, _Again) or not (isinstance(error, OSError) or type(error).__module__.startswith(_TRANSPORT)):
                raise
            raise _Again(f"the answer broke off: {type(error).__name__}") from None
        return self._parsed(body)

    def _parsed(self, body: bytes) -> Reply:
        try:
            found = json.loads(body)
            message, model = found["choices"][0]["message"], found.get("model")
            text = message["content"]
            if not isinstance(text, str | None):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Again("an answer that is no chat completion") from None
        # A model that declines gives no content; the official code takes that as a reply that it cannot read.
        text = text or ""
        if len(self._key) >= _SHORTEST_KEY:
            text = text.replace(self._key, MASK)
        model = self._clean(model) if isinstance(model, str) and model else self._model
        return Reply(text, model, self._address, datetime.now(UTC).date().isoformat())

    def _refused(self, error: Any) -> Exception:
        """What a status of 400 or more means: _Again or a UserError."""
        status = error.status_code
        if status == 429 and error.code == "insufficient_quota":
            return UserError(f"--judge: the account at {self._address} has no credit left; the same command goes on once it has")
        if status in (408, 409, 425, 429) or status >= 500:
            return _Again(f"status {status}", _seconds(error.response.headers))
        if status in (401, 403):
            found = f"does not accept the key in {KEY}" if self._key else f"asks for a key, and {KEY} is not set"
            return UserError(f"--judge: {self._address} {found} (status {status}); set {KEY} to a key of that address")
        if status == 404:
            what = f"knows no model {shortened(self._model)}, or no chat completions below that URL"
            return UserError(
                f"--judge: {self._address} {what} (status 404); give --judge a model it has and --base-url its URL, mostly ending with /v1"
            )
        body = error.body if isinstance(error.body, dict) else {}
        said = self._clean(str(body.get("message") or error.message))
        return UserError(f"--judge: {self._address} refuses the request (status {status}: {said}); give a judge that takes it")

    def _clean(self, text: str) -> str:
        """Words of the server as a message may repeat them: one line, not long, without the key."""
        if len(self._key) >= _SHORTEST_KEY:
            text = text.replace(self._key, MASK)
        return shortened(printable(masked(" ".join(text.split()))))


class _Progress:
    """Says now and then how far the judging is."""

    def __init__(self, total: int, say: Callable[[str], None] | None) -> None:
        self._total, self._say = total, say
        self._done = self._paid = 0
        self._began = self._said = self._now()
        self._counting = threading.Lock()

    def step(self, request: Request, paid: bool) -> None:
        """One more reply is there, asked for now or before."""
        with self._counting:
            # Further attempts at a question are no further questions.
            self._done += request.attempt == 0
            self._paid += paid and request.attempt == 0
            now = self._now()
            if self._say is None or now - self._said < 10 or not self._paid:
                return
            self._said = now
            left = (self._total - self._done) * (now - self._began) / self._paid
            self._say(f"judged {self._done:,} of {self._total:,}, about {left:,.0f} s left")

    def _now(self) -> float:
        return time.monotonic()


def _host(url: str) -> str:
    """Host and port of `url`. Raises UserError for what cannot be the address of a server, or says a password."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        port = parts.port
    except ValueError:
        host = port = parts = None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise UserError("--base-url is no address of a server; write it such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(f"--base-url says more than an address; set {KEY} for a key, and write the URL without user, password and query")
    name = f"[{host}]" if ":" in host else host
    return printable(name if port is None else f"{name}:{port}")


def _seconds(headers: Mapping[str, str]) -> float:
    """What Retry-After asks for: seconds, or a date. 0 where it says nothing that can be understood."""
    said = headers.get("retry-after", "").strip()
    try:
        after = float(said) if not said[:1].isalpha() or said[:3].lower() in ("inf", "nan") else _until(said)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return after if 0.0 < after < float("inf") else 0.0


def _until(date: str) -> float:
    return (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds()


def _within(seconds: float, work: Callable[[], Reply]) -> Reply:
    """`work`, in a thread of its own that is left behind after twice `seconds`: a server may send a byte now and then for ever."""
    done: queue.SimpleQueue[tuple[Reply | None, BaseException | None]] = queue.SimpleQueue()

    def worker() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=worker, daemon=True).start()
    try:
        reply, error = done.get(timeout=2 * seconds)
    except queue.Empty:
        raise _Again("no whole answer in time") from None
    if reply is None:
        raise error or RuntimeError("a worker without a result")
    return reply
