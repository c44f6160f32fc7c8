"""What counts as a standstill, without processes: clocks and messages are given."""

import pytest

from fastllava.distributed.processes import ALONE, Processes
from fastllava.train.watch import standstill
from fastllava.train.watch.standstill import Beat, Judge, Motion, Phase

STILL = (Phase.FETCHING, 7, 9, [1])


class Clock:
    def __init__(self, monkeypatch):
        self.now = self.used = 0.0
        monkeypatch.setattr(standstill.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(standstill.time, "process_time", lambda: self.used)

    def after(self, seconds, motion, *look, busy=0.0):
        """The moves within these seconds, looked at each second."""
        before = motion.moves
        for _ in range(seconds):
            self.now += 1
            self.used += busy
            assert not motion.look(*look)
        return motion.moves - before


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("phase", "steps", "busy", "moves"),
    [
        (Phase.FETCHING, 9, 1.0, False),
        (Phase.AGREEING, 9, 1.0, False),
        (Phase.READING, 9, 1.0, False),
        (Phase.STEPPING, 9, 0.0, False),
        (Phase.STEPPING, 9, 1.0, True),
        # torch.compile and Triton may take minutes, in other processes too.
        (Phase.STEPPING, 3, 0.0, True),
        (Phase.READING, 3, 0.0, True),
        (Phase.EVALUATING, 9, 0.0, False),
        (Phase.EVALUATING, 9, 1.0, True),
        (Phase.EVALUATING, 3, 0.0, True),
        (Phase.STARTING, 0, 0.0, True),
        (Phase.WRITING, 9, 0.0, True),
    ],
)
def test_what_moves(phase, steps, busy, moves, clock):
    motion = Motion(1.0)
    clock.after(1, motion, phase, 7, steps, [1])
    assert clock.after(50, motion, phase, 7, steps, [1], busy=busy) == 50 * moves


def test_a_new_phase_moves(clock):
    motion = Motion(1.0)
    clock.after(9, motion, *STILL)
    assert motion.waited == 8
    assert clock.after(1, motion, Phase.AGREEING, 8, 9, [1]) == 1
    assert motion.waited == 0


def test_slow_reads_are_no_standstill(clock):
    motion = Motion(1.0)
    clock.after(1, motion, *STILL)
    for sample in range(5):
        clock.after(40, motion, Phase.FETCHING, 7, 9, [sample])
        assert motion.waited == 39


def test_a_long_step_is_no_wait_for_workers(clock):
    motion = Motion(1.0)
    clock.after(100, motion, Phase.STEPPING, 7, 9, [1], busy=1.0)
    clock.after(1, motion, Phase.FETCHING, 8, 9, [1])
    assert motion.waited == 0


def test_a_process_that_was_stopped_itself_begins_its_clocks_again(clock):
    motion = Motion(1.0)
    clock.after(50, motion, *STILL)
    clock.now += 500
    assert motion.look(*STILL)
    assert motion.waited == 0


def test_alone_the_trouble_is_told_and_a_wait_without_end():
    judge = Judge(60.0, ALONE, None)
    assert judge.verdict(Beat(1, Phase.FETCHING, None), 0.0) is None
    assert judge.verdict(Beat(1, Phase.FETCHING, "the workers"), 10.0) == "the workers"
    assert judge.verdict(Beat(2, Phase.READING, None), 20.0) is None
    assert judge.verdict(Beat(2, Phase.READING, None), 82.0) is None
    found = judge.verdict(Beat(2, Phase.READING, None), 83.0)
    assert found == "nothing has moved for 63 s: process 0 is waiting for a step's numbers"


class Wire:
    """The exchange of a first process with process 1, by hand."""

    class Line:
        closed = False

    class Peer:
        stopped = killed = False

        def kill(self):
            self.killed = True

    def __init__(self):
        self.lines, self.peers = {1: self.Line()}, {1: self.Peer()}
        self.inbox, self.sent = [], []

    def receive(self):
        taken, self.inbox = self.inbox, []
        return [(1, message) for message in taken]

    def send(self, message):
        self.sent.append(message)

    def says(self, moves=0, phase=Phase.AGREEING, **more):
        self.inbox.append({"moves": moves, "phase": phase.name, "trouble": None, **more})


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def judge(wire):
    return Judge(60.0, Processes(0, 2), wire)


WAITS = Beat(5, Phase.AGREEING, None)


def test_who_waits_for_one_that_moves_is_not_stuck(wire, judge):
    for second in range(300):
        wire.says(moves=second // 50, phase=Phase.FETCHING)
        assert judge.verdict(WAITS, second) is None
    for second in range(300, 314):
        wire.says(moves=5, phase=Phase.FETCHING)
        found = judge.verdict(WAITS, second)
    waits = "process 0 is waiting for the other processes, process 1 is waiting for its data workers"
    assert found == f"nothing has moved for 63 s: {waits}"
    assert wire.sent[-1] == {"verdict": found}


def test_the_trouble_of_any_process_ends_all(wire, judge):
    wire.says(phase=Phase.FETCHING, trouble="process 1 has waited")
    assert judge.verdict(WAITS, 1.0) == "process 1 has waited"
    assert wire.sent == [{"verdict": "process 1 has waited"}]


@pytest.mark.parametrize(
    ("phase", "stopped", "limit"), [(Phase.STEPPING, False, 60), (Phase.WRITING, False, 600), (Phase.WRITING, True, 60)]
)
def test_a_process_that_is_not_heard_of(phase, stopped, limit, wire, judge):
    wire.says(phase=phase)
    assert judge.verdict(WAITS, 0.0) is None
    wire.peers[1].stopped = stopped
    assert judge.verdict(Beat(6, Phase.WRITING, None), float(limit)) is None
    assert f"process 1 has not been heard of for {limit + 1} s" in judge.verdict(Beat(7, Phase.WRITING, None), limit + 1.0)
    judge.kill_silent()
    assert wire.peers[1].killed


@pytest.mark.parametrize("how", ["closed", "failed", "bye"])
def test_a_process_that_has_gone(how, wire, judge):
    wire.says()
    assert judge.verdict(WAITS, 0.0) is None
    if how != "closed":
        wire.inbox.append({"end": how})
    wire.lines[1].closed = True
    for second in range(1, 200):
        assert judge.verdict(Beat(second, Phase.STEPPING, None), float(second)) is None
    assert judge.ended_at == (None if how == "bye" else 1.0)
    assert wire.sent[-1].get("ended", False) is (how != "bye")


def test_after_a_sleep_of_its_own_nobody_was_silent(wire, judge):
    wire.says()
    assert judge.verdict(WAITS, 0.0) is None
    judge.begin_again(1000.0)
    assert judge.verdict(WAITS, 1000.0) is None
