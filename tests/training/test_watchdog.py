"""A run that hangs ends with its stacks and the sample's name; one that is slow, or was stopped as a whole, goes on."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from parallel_runs import METHOD
from rich.console import Console

from fastllava.config import check_config
from fastllava.data import loader, rows
from fastllava.distributed.processes import ALONE
from fastllava.train import loop as train
from fastllava.train.state import checkpoint
from fastllava.train.watch.standstill import Phase
from fastllava.train.watch.watchdog import STUCK, Watchdog

SECONDS = 1.0


def begin(count, values, tmp_path, deed=lambda rank: None):
    """The processes of a run; each writes to tmp_path/said.RANK."""
    context = torch.multiprocessing.get_context(METHOD)
    processes = [context.Process(target=_run, args=(rank, count, values, tmp_path, deed)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def _run(rank, count, values, folder, deed):
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(folder / f"said.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ["LOCAL_RANK"] = str(rank)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    deed(rank)
    train.run(check_config(values), Console(file=os.fdopen(1, "w", closefd=False), width=1000))


def ends(processes, tmp_path, within=10.0):
    """The exit codes of the processes, and what they said; those that have not ended are killed."""
    end = time.monotonic() + within
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, [(tmp_path / f"said.{rank}").read_text() for rank in range(len(processes))]


def wait_for_steps(tmp_path, count):
    for _ in range(600):
        path = tmp_path / "run" / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError("no steps")


@pytest.fixture
def values(settings, world):
    def make(workers, **train_keys):
        keys = {"epochs": 500, "watchdog_seconds": SECONDS, "device": "cpu", "checkpoint_steps": 4, **train_keys}
        return settings("finetune", data={"workers": workers, "prepared_dir": str(world / "prepared")}, train=keys)

    return make


def reads_forever(path, *args):
    if path.name == "9.png":
        time.sleep(3600)
    return honest_load_image(path, *args)


honest_load_image = loader.load_image


@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_that_hangs_is_named(workers, values, tmp_path):
    def deed(_):
        loader.load_image = reads_forever

    codes, (said,) = ends(begin(1, values(workers), tmp_path, deed), tmp_path)
    assert codes == [STUCK], said
    assert "reads_forever" in said, "no stack of the process that reads"
    assert "watchdog: stacks of process 0, which is waiting for its data workers" in said
    last = said.splitlines()[-1]
    assert last.startswith("error: train.watchdog_seconds: the run has waited 1 s for its data workers, which read record chat9 (/")
    assert "9.png); the run has ended, the same command " in last


@pytest.mark.parametrize("count", [1, 2])
def test_a_record_that_hangs_while_the_data_are_prepared_is_named(count, settings, tmp_path):
    def deed(_):
        honest = rows.examine
        rows.examine = lambda path, *args: time.sleep(3600) if path.name == "9.png" else honest(path, *args)

    values = settings("finetune", data={"prepared_dir": str(tmp_path / "prepared")}, train={"watchdog_seconds": SECONDS, "device": "cpu"})
    codes, said = ends(begin(count, values, tmp_path, deed), tmp_path)
    assert codes == [STUCK] * count, said
    assert "has waited 1 s for what prepares its data, which read record number " in said[0].splitlines()[-1]
    assert said[0].endswith("of data.records; the run has ended, the same command starts anew\n")


@pytest.mark.parametrize("who", ["first", pytest.param("last", marks=pytest.mark.exhaustive), "worker of last"])
def test_what_is_stopped_is_named_and_everything_ends(who, values, tmp_path):
    processes = begin(2, values(1), tmp_path)
    wait_for_steps(tmp_path, 6)
    rank = int(who != "first")
    victim = processes[rank].pid
    if "worker" in who:
        with open(f"/proc/{victim}/task/{victim}/children") as file:
            victim = int(file.read().split()[0])
    os.kill(victim, signal.SIGSTOP)
    codes, said = ends(processes, tmp_path)
    stopped = -signal.SIGKILL if victim == processes[rank].pid else STUCK
    assert codes == [stopped if rank == 0 else STUCK, STUCK if rank == 0 else stopped], said
    (told,) = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    expected = f"worker {victim} is stopped" if "worker" in who else f"process {rank} has not been heard of for 1 s"
    assert expected in told
    assert "the same command goes on from checkpoint-" in told
    assert all("watchdog: stacks of process" in text for text, code in zip(said, codes, strict=True) if code == STUCK)


@pytest.mark.exhaustive
def test_what_is_stopped_as_a_whole_goes_on_when_it_is_woken(values, tmp_path):
    processes = begin(2, values(0, max_steps=60, checkpoint_steps=None, watchdog_seconds=2 * SECONDS), tmp_path)
    wait_for_steps(tmp_path, 6)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process.pid, number)
        if number == signal.SIGSTOP:
            time.sleep(4.5 * SECONDS)
    codes, said = ends(processes, tmp_path, 60.0)
    assert codes == [0, 0], said


def slow(seconds):
    def deed(rank):
        def load_image(*args):
            time.sleep(seconds * (rank == 0))
            return honest_load_image(*args)

        loader.load_image = load_image
        honest = checkpoint.save

        def save(*args, **named):
            time.sleep(2 * SECONDS * (rank == 0))
            return honest(*args, **named)

        checkpoint.save = save

    return deed


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_slow_goes_on(workers, values, tmp_path):
    codes, said = ends(begin(2, values(workers, epochs=1, max_steps=6), tmp_path, slow(0.6)), tmp_path, 60.0)
    assert codes == [0, 0], said


@pytest.mark.parametrize("off", [None, 0])
def test_it_can_be_turned_off(off, values):
    with Watchdog(check_config(values(0, watchdog_seconds=off)).train.watchdog_seconds, ALONE, 0) as watch:
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]
        watch.now(Phase.FETCHING)
    with Watchdog(60.0, ALONE, 0):
        assert "watchdog" in [thread.name for thread in threading.enumerate()]
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
