"""What a judge replied, kept by request: a run that goes on after a stop pays for nothing twice."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllava.disk import held_alone
from fastllava.errors import UserError
from fastllava.evaluate.judge import Reply, Request


def digest(model: str, address: str, request: Request) -> str:
    """What tells one request from another: everything that the server is sent, where it is sent, about which question and in which run.

    Two questions may be sent as one text; each gets a reply of its own, as in the official code.
    """
    asked = [
        model,
        address,
        str(request.question),
        request.run,
        request.temperature,
        request.max_tokens,
        [dict(one) for one in request.messages],
    ]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=True, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """A file of JSON lines, a reply each, written to the disk one by one.

    A line that a kill cut off, which can only be the last, is taken away when the file is opened. One process writes it at a time.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, or begin it. Raises UserError when it cannot be written, holds something else or another process writes it."""
        self._path = path
        self._writing = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"the judge's replies cannot be kept in {path} ({error.strerror}); give a folder that can be written") from None
        if not held_alone(self._file):
            self._file.close()
            raise UserError(f"another process writes the judge's replies to {path}; wait for it")
        self._replies = self._read()

    def __len__(self) -> int:
        """Replies in it."""
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        """The reply to the request with that digest, if there is one."""
        return self._replies.get(key)

    def add(self, key: str, request: Request, asked: str, reply: Reply) -> None:
        """Keep `reply`; it is on the disk on return. `asked` is the model as it was asked for. Raises UserError for a full disk."""
        row = {
            "request": key,
            "question_id": request.question,
            "run": request.run,
            "attempt": request.attempt,
            "judge": asked,
            "model": reply.model,
            "address": reply.address,
            "date": reply.date,
            "reply": reply.text,
        }
        with self._writing:
            try:
                self._file.write(json.dumps(row).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise UserError(f"a reply of the judge cannot be written to {self._path} ({error.strerror}); make room there") from None
            self._replies[key] = reply

    def close(self) -> None:
        """Let another process have the file."""
        self._file.close()

    def _read(self) -> dict[str, Reply]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        replies = {}
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                replies[row["request"]] = _reply(row)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"line {number} of {self._path} is no reply of a judge; name another file for them, or take the line out to ask again"
                ) from None
        if whole < len(content):
            self._file.truncate(whole)
        return replies


def _reply(row: Mapping[str, Any]) -> Reply:
    texts = [row["reply"], row["model"], row["address"], row["date"]]
    if not all(isinstance(one, str) or (one is None and place > 0) for place, one in enumerate(texts)):
        raise TypeError
    return Reply(*texts)
