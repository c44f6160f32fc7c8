"""A real browser for a test: headless Chromium, told what to do over pipes by its DevTools protocol, which needs no further package."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60.0
# The protocol has its pipes at 3 and 4.
_WITH_PIPES = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"


def found() -> str | None:
    """Where a Chromium lies on this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Seen:
    """What happened while a page was open."""

    problems: list[str] = field(default_factory=list)
    """Errors and warnings on the console, exceptions of scripts, and what the page's policy has refused."""
    requests: list[str] = field(default_factory=list)
    """Every address that was asked for, but for the page itself and data: addresses."""


class Browser:
    """One browser with one page."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._rest, self._number, self._events = send, receive, b"", 0, []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Seen:
        """Show the file `path` and wait until it is loaded and idle."""
        self._events.clear()
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        address = path.resolve().as_uri()
        self._call("Page.navigate", url=address)
        deadline = time.monotonic() + _SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._message(deadline))
        # What comes late: an answer to a question after all of it has come.
        self.value("new Promise(done => setTimeout(() => done(1), 150))")
        return self._seen(address)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page; a promise is waited for."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a place of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def _seen(self, address: str) -> Seen:
        seen = Seen()
        for event in self._events:
            method, said = event["method"], event.get("params", {})
            if method == "Runtime.exceptionThrown":
                seen.problems.append(json.dumps(said["exceptionDetails"]))
            elif (method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning")) or (
                method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert")
            ):
                seen.problems.append(json.dumps(said))
            elif method == "Network.requestWillBeSent":
                asked = said["request"]["url"]
                if asked.partition("#")[0] != address and not asked.startswith("data:"):
                    seen.requests.append(asked)
        return seen

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        session = getattr(self, "_session", None)
        message = {"id": self._number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while (answer := self._message(deadline)).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser says nothing"
            more = os.read(self._receive, 2**16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with an empty `profile`, which ends with the block."""
    theirs_in, send = os.pipe()
    receive, theirs_out = os.pipe()
    options = [
        "--headless",
        "--remote-debugging-pipe",
        "--disable-gpu",
        "--no-first-run",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    # It refuses its sandbox to root, as whom containers run.
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [sys.executable, "-c", _WITH_PIPES, str(theirs_in), str(theirs_out), program, *options]
    process = subprocess.Popen(
        command, pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(send, receive)
    finally:
        os.close(send)
        os.close(receive)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
