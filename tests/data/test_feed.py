"""Workers: in order whatever befalls them, gone when nobody needs them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from worker_processes import alive, feed_of, waits

from fastllava.data import feed as feed_module
from fastllava.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


def once(tmp_path, deed):
    def at_seven(number):
        if number == 7 and not (tmp_path / "done").exists():
            (tmp_path / "done").touch()
            deed()

    return at_seven


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(0)])
def test_the_same_follows_when_a_worker_dies(workers, end, tmp_path):
    said = []
    with closing(feed_of(once(tmp_path, end), workers, said)) as feed:
        assert [feed.take(number) for number in range(20)] == list(range(20))
    assert len(said) == 1
    assert "while it read number 7; started again, nothing is lost" in said[0]
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_between_two_jobs_is_seen_within_a_second(tmp_path):
    said = []
    with closing(feed_of(said=said)) as feed:
        assert feed.take(0) == 0
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        began = time.monotonic()
        assert [feed.take(number) for number in range(1, 20)] == list(range(1, 20))
    assert time.monotonic() - began < 4
    assert ["was killed by SIGKILL; started again" in line for line in said] == [True]


def hangs_once(tmp_path, honest, how):
    """A begin_worker that hangs the first time it is called, as a process does that was forked with a lock held."""

    def begin_worker(parent):
        if not (tmp_path / "pid").exists():
            (tmp_path / "pid").write_text(str(os.getpid()))
            how()
        honest(parent)

    return begin_worker


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("how", [lambda: time.sleep(3600), lambda: os.kill(os.getpid(), signal.SIGSTOP)])
def test_a_worker_that_hangs_before_it_begins_is_replaced(workers, how, tmp_path, monkeypatch):
    monkeypatch.setattr(feed_module, "_BEGIN_SECONDS", 1.0)
    monkeypatch.setattr(feed_module, "begin_worker", hangs_once(tmp_path, feed_module.begin_worker, how))
    said = []
    with closing(feed_of(workers=workers, said=said)) as feed:
        assert [feed.take(number) for number in range(20)] == list(range(20))
    assert said == ["data.workers: a worker was hanging ever since it was started 1 s ago; started again, nothing is lost"]
    assert not alive(int((tmp_path / "pid").read_text()))
    assert multiprocessing.active_children() == []


def test_a_worker_that_hangs_before_it_begins_shows_its_stacks_when_asked(tmp_path, monkeypatch, capfd):
    def here():
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "lived").touch()
        time.sleep(3600)

    monkeypatch.setattr(feed_module, "_BEGIN_SECONDS", 1.0)
    monkeypatch.setattr(feed_module, "begin_worker", hangs_once(tmp_path, feed_module.begin_worker, here))
    before = signal.getsignal(signal.SIGUSR1), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with closing(feed_of()) as feed:
        assert feed.take(0) == 0
    assert (tmp_path / "lived").exists()
    assert "in begin_worker" in capfd.readouterr().err
    assert (signal.getsignal(signal.SIGUSR1), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before


def test_what_kills_workers_again_and_again_is_named():
    named = r"data\.workers: a worker was gone with exit code 3 while it read number 2, for the third time"
    with closing(feed_of(lambda number: os._exit(3) if number == 2 else None)) as feed, pytest.raises(UserError, match=named):
        [feed.take(number) for number in range(3)]
    assert multiprocessing.active_children() == []


def test_workers_that_cannot_be_started_name_the_remedy(monkeypatch):
    class Full:
        def __init__(self, *_, **__):
            pass

        def __iter__(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(feed_module, "DataLoader", Full)
    with pytest.raises(UserError, match=r"workers cannot be started \(No space left on device\); make /dev/shm larger .*data\.workers=0"):
        feed_of()


@pytest.mark.parametrize("state", ["waits", "hangs", "is stopped"])
def test_closing_ends_workers_at_once(state, tmp_path):
    with closing(feed_of(lambda number: time.sleep(3600 * (state == "hangs" and number == 1)), 2)) as feed:
        feed.take(0)
        workers = multiprocessing.active_children()
        if state == "is stopped":
            os.kill(workers[0].pid, signal.SIGSTOP)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert not any(worker.is_alive() for worker in workers)


def test_signals_of_the_group_are_the_parents_to_answer_and_its_sigterm_ends_a_worker():
    with closing(feed_of()) as feed:
        feed.take(0)
        (worker,) = multiprocessing.active_children()
        # From another process than the parent, as torchrun and schedulers send them.
        for name in ("INT", "HUP", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        worker.join(1.0)
        assert worker.is_alive()
        worker.terminate()
        worker.join(5.0)
        assert not worker.is_alive()


@pytest.mark.parametrize("method", ["fork", *(pytest.param(slow, marks=pytest.mark.exhaustive) for slow in ("spawn", "forkserver"))])
def test_a_worker_stays_however_it_was_started_until_its_parent_ends_it(method):
    context = multiprocessing.get_context(method)
    begun = context.Event()
    worker = context.Process(target=waits, args=(os.getpid(), begun), daemon=True)
    worker.start()
    assert begun.wait(30)
    worker.join(1.0)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5.0)
    assert not worker.is_alive()


PARENT = """
import os, sys, time
sys.path.insert(0, {folder!r})
from worker_processes import feed_of
feed = feed_of(lambda number: time.sleep(3600 * (number == 1)), 2)
feed.take(0)
import multiprocessing
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("os.kill(os.getpid(), 9)", -9), ("os.kill(os.getpid(), 15)", -15), ("raise ValueError", 1), ("os._exit(4)", 4), ("", 0)],
)
def test_no_worker_outlives_its_parent_and_none_holds_it_up(end, code):
    script = PARENT.format(folder=os.path.dirname(__file__), end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    deadline = time.monotonic() + 3
    left = [int(word) for word in done.stdout.split()]
    assert len(left) == 2
    while (left := [pid for pid in left if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
