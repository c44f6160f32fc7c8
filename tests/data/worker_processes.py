"""What worker processes of tests do, in a module that they can import, and what becomes of them."""

import os
import signal
import time
from pathlib import Path

from torch.utils.data import Dataset

from fastllava.data.feed import Feed
from fastllava.data.records import Raw
from fastllava.data.workers import Board, begin_worker


class Numbers(Dataset):
    """The number itself, when it has been read."""

    def __init__(self, board, deed=lambda number: None):
        self.board, self.deed = board, deed

    def __getitem__(self, number):
        with self.board.at(number):
            self.deed(number)
            return number


def feed_of(deed=lambda number: None, workers=1, said=None, first=0):
    board = Board(workers)
    jobs = lambda place: iter(range(place, 20))  # noqa: E731
    report = [].append if said is None else said.append
    return Feed(Numbers(board, deed), jobs, first, workers, board, lambda number: f"number {number}", pin=False, report=report)


def waits(parent, begun):
    """A worker that waits for ever."""
    begin_worker(parent)
    begun.set()
    time.sleep(3600)


class Slow:
    """A stand-in for a Preparer that says which process it is, and takes its time."""

    def __init__(self, seconds=0.0, dies=False):
        self.seconds, self.dies, self.board = seconds, dies, Board(2)

    def batch(self, raws):
        with self.board.at(raws[0].index):
            time.sleep(self.seconds)
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{os.getpid()} {len(raws)}"


def raws(count):
    """Records large enough for one to be a batch."""
    return (Raw(index, 1, 8 * 2**20, {}) for index in range(count))


def alive(pid):
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
