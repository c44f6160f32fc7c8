"""What the processes of a run tell each other beside their work, so that none waits for one that has gone, failed or stopped.

The first process listens, the others connect to it; a message is a line of JSON. Whatever hangs in the training, these
connections are served by each process's watch thread.
"""

import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastllava.data.workers import process_state
from fastllava.distributed.processes import Processes

_CONNECT_SECONDS = 30.0
_LONGEST = 2**20

Message = dict[str, Any]


class Line:
    """One end of a connection. Never waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection, self._read = connection, b""
        self.closed = False

    def send(self, message: Message) -> None:
        """What does not fit, as the other end has read nothing for long, is dropped."""
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> Iterator[Message]:
        """All messages that have come. After the last one `closed` says whether the other end has gone."""
        try:
            while part := self._connection.recv(2**16):
                self._read += part
                if len(self._read) > _LONGEST:
                    break  # that is none of ours
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._read = self._read.split(b"\n")
        for line in lines:
            with suppress(ValueError):
                if isinstance(message := json.loads(line), dict):
                    yield message

    def close(self) -> None:
        self._connection.close()


class Exchange:
    """The connections of this process: to the first one, or of the first one to all others."""

    def __init__(self, group: Processes) -> None:
        """All processes of the `group` call this together. Raises OSError where the first one cannot be reached, on it or from here."""
        self.lines: dict[int, Line] = {}
        """By rank: those that have said who they are."""
        self.peers: dict[int, Peer] = {}
        self._unknown: list[Line] = []
        self._listener: socket.socket | None = None
        host, port, self._token, first = group.on_first(lambda: self._invite(group.world))
        if self._listener is None:
            line = Line(socket.create_connection((host, port), timeout=_CONNECT_SECONDS))
            line.send({"token": self._token, "rank": group.rank, "who": Peer.me()})
            self.lines[0], self.peers[0] = line, Peer(first)

    def _invite(self, world: int) -> tuple[str, int, str, Message]:
        """Listen; where, the word to enter by, and who this is."""
        try:
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=world, dualstack_ipv6=True)
        except (OSError, ValueError):
            self._listener = socket.create_server(("", 0), backlog=world)
        self._listener.setblocking(False)
        return os.environ.get("MASTER_ADDR", "localhost"), self._listener.getsockname()[1], secrets.token_hex(16), Peer.me()

    def receive(self) -> Iterator[tuple[int, Message]]:
        """Every message that has come, and from whom."""
        self._greet()
        for rank, line in self.lines.items():
            for message in line.receive():
                yield rank, message

    def send(self, message: Message) -> None:
        """To all whom this process is connected to."""
        for line in self.lines.values():
            line.send(message)

    def close(self) -> None:
        for end in (*self.lines.values(), *self._unknown, *([self._listener] if self._listener else [])):
            end.close()

    def _greet(self) -> None:
        """Accept who connects, and shows that it is one of ours."""
        if self._listener is None:
            return
        with suppress(OSError):
            while True:
                self._unknown.append(Line(self._listener.accept()[0]))
        for line in list(self._unknown):
            hello = next(line.receive(), None)
            if hello is not None and hello.get("token") == self._token:
                self.lines[hello["rank"]], self.peers[hello["rank"]] = line, Peer(hello["who"])
            elif hello is None and not line.closed:
                continue
            self._unknown.remove(line)


class Peer:
    """Another process: what can be seen of it, and done, from outside where it is on this machine."""

    def __init__(self, who: Message) -> None:
        self._handle = -1
        self._pid = who["pid"]
        if who["machine"] and who["machine"] == self.me()["machine"]:
            with suppress(OSError, AttributeError):
                self._handle = os.pidfd_open(self._pid)

    @staticmethod
    def me() -> Message:
        """This process, for others to know it by: its machine too, as far as process numbers have one meaning there."""
        machine = None
        if sys.platform == "linux":
            with suppress(OSError):
                boot = Path("/proc/sys/kernel/random/boot_id").read_text()
                machine = f"{boot.strip()} {os.stat('/proc/self/ns/pid').st_ino}"
        return {"pid": os.getpid(), "machine": machine}

    @property
    def stopped(self) -> bool:
        """Whether it is known to be stopped, as by SIGSTOP or a debugger."""
        return self._handle >= 0 and process_state(self._pid) in ("T", "t")

    def kill(self) -> None:
        """End it, if it is on this machine: one that is stopped does not end of itself."""
        if self._handle >= 0:
            with suppress(OSError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
