"""Every process ends, soon and with a code that is not 0, whatever goes wrong in whichever, and whenever; one says what."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml
from parallel_runs import METHOD

from fastllava import cli
from fastllava.data import loader
from fastllava.errors import UserError
from fastllava.model.llava import Llava
from fastllava.optim import optim
from fastllava.train import dataset, result, setup, step
from fastllava.train import loop as train
from fastllava.train.metrics import log as metrics
from fastllava.train.state import checkpoint

SOON = 15.0
"""Seconds from the mishap on; the machine may be busy."""

# Where it goes wrong: what is replaced, and on which process, the first or the last.
PHASES = {
    "prepare": (dataset, "prepare_data", "first"),
    "check": (train, "check_run", "last"),
    "weights": (setup, "load_llava", "last"),
    "optimizer": (setup, "build_optimizer", "last"),
    "fetch": (loader, "load_image", "last"),
    "rate": (train, "set_lr", "last"),
    "forward": (Llava, "forward", "last"),
    "backward": (step, "gradient_norm", "last"),
    "guard": (optim.FiniteGuard, "watch", "last"),
    "numbers": (metrics.DeviceScalars, "read", "last"),
    "record": (metrics.Metrics, "write", "first"),
    "save": (checkpoint, "_complete", "first"),
    "rotate": (checkpoint, "keep_last", "first"),
    "gather": (result, "gather_result", "last"),
    "result": (result, "write_result", "first"),
    "summary": (result, "write_summary", "first"),
}
MISHAPS = {
    "user": lambda: UserError("data.images: it is so"),
    "full": lambda: OSError(28, "No space left on device"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "library": lambda: RuntimeError("expected scalar type Half"),
    "bug": lambda: ValueError("too many values to unpack"),
    "odd": lambda: Odd(1, 2),
    "stop": lambda: KeyboardInterrupt(),
}
TOLD = {"user": "it is so", "full": "No space left", "memory": "of memory|too much", "library": "Half", "bug": "unpack", "odd": "1 2"}
GOES_ON = {("save", "full"), ("rotate", "full")}
"""The training does, and says so."""
WITHIN_A_STEP = {"rate", "forward", "backward", "guard"}


class Odd(Exception):
    """An error that does not survive pickling."""

    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


def run_all(count, values, phase, mishap, tmp_path):
    """The exit codes of the processes of a run in which that happens, what each wrote to stderr, and its sessions' survivors."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    context = torch.multiprocessing.get_context(METHOD)
    processes = [context.Process(target=_command, args=(rank, count, path, phase, mishap, tmp_path)) for rank in range(count)]
    for process in processes:
        process.start()
    while not (tmp_path / "happened").exists() and any(process.is_alive() for process in processes):
        time.sleep(0.05)
    end = time.monotonic() + SOON
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    left = [pid for process in processes for pid in of_session(process.pid)]
    for pid in left:
        os.kill(pid, 9)
    return codes, [(tmp_path / f"stderr.{rank}").read_text() for rank in range(count)], left


def of_session(session):
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(number) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _command(rank, count, path, phase, mishap, folder):
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(folder / f"{'stdout' if number == 1 else 'stderr'}.{rank}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    where, name, who = PHASES[phase]
    honest = getattr(where, name)
    if rank == (0 if who == "first" else count - 1):

        def fails(*args, **kwargs):
            # The second time, where there is one: a run that has only begun is less to lose.
            if phase in ("fetch", "forward", "rate", "record", "numbers") and not (folder / "once").exists():
                (folder / "once").touch()
                return honest(*args, **kwargs)
            (folder / "happened").touch()
            raise MISHAPS[mishap]()

        setattr(where, name, fails)
    result.plot_loss = lambda *_: None
    sys.argv = ["fastllava", "train", str(path)]
    cli.main()


def check(phase, mishap, count, workers, settings, world, tmp_path):
    values = settings(
        "finetune",
        data={"workers": workers, "prepared_dir": str(world / "prepared")},
        train={"max_steps": 6, "checkpoint_steps": 2, "device": "cpu"},
    )
    codes, said, left = run_all(count, values, phase, mishap, tmp_path)
    assert (tmp_path / "happened").exists(), said
    assert None not in codes, (codes, said)
    assert left == []
    if (phase, mishap) in GOES_ON:
        assert codes == [0] * count, said
        return
    assert 0 not in codes, (codes, said)
    telling = [text for text in said if "error: " in text or "Traceback" in text]
    assert len(telling) <= 1, said
    if mishap in TOLD:
        assert re.search(TOLD[mishap], telling[0]), said
        if count > 1 and phase in WITHIN_A_STEP:
            assert re.search(r"nothing is saved within a step of several processes: the same command (begins at|goes on from)", telling[0])


@pytest.mark.parametrize(("phase", "mishap"), [("fetch", "bug"), ("forward", "library"), ("record", "odd"), ("result", "full")])
def test_two_processes_end_with_the_one_that_fails(phase, mishap, settings, world, tmp_path):
    check(phase, mishap, 2, 1, settings, world, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mishap", MISHAPS)
@pytest.mark.parametrize("phase", PHASES)
def test_all_end_whatever_happens_wherever(phase, mishap, count, workers, settings, world, tmp_path):
    if (phase, count) == ("gather", 1):
        pytest.skip("one process has nothing to gather")
    check(phase, mishap, count, workers, settings, world, tmp_path)
