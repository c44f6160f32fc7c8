"""The workers of `prepare` end with it, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from worker_processes import Slow, alive, raws

from fastllava.data.rows import prepare_batches
from fastllava.errors import UserError

PREPARES = """
import itertools, os, sys, time
sys.path.insert(0, {folder!r})
from worker_processes import Slow, raws
from fastllava.data.rows import prepare_batches
if __name__ == "__main__":
    done = prepare_batches(raws(1000), Slow(), 2)
    print(next(done).split()[0], flush=True)
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, -2)])
def test_a_prepare_that_is_stopped_leaves_no_worker(number, code, tmp_path):
    script = tmp_path / "prepares.py"
    script.write_text(PREPARES.format(folder=os.path.dirname(__file__)))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    workers = {int(process.stdout.readline()), *map(int, process.stdout.readline().split())}
    assert len(workers) == 2
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == code
    while (left := [pid for pid in workers if alive(pid)]) and time.monotonic() - began < 5:
        time.sleep(0.05)
    assert left == []


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match=r"data\.workers: a worker process died"):
        list(prepare_batches(raws(4), Slow(dies=True), 1))


def test_a_worker_shows_what_it_is_at():
    preparer = Slow()
    assert len(list(prepare_batches(raws(3), preparer, 1))) == 3
    count, worker, sample = preparer.board.state()[:3]
    assert (count, sample) == (3, 0)
    assert worker != os.getpid()


def test_leaving_early_waits_for_no_worker():
    batches = prepare_batches(raws(100), Slow(0.0), 1)
    next(batches)
    batches.close()
    slow = prepare_batches(raws(100), Slow(3600.0), 1)
    signal.setitimer(signal.ITIMER_REAL, 3.0)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(slow)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 6
