"""How the processes of a run agree: in two of them, and in one that is alone."""

import json
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from parallel_runs import METHOD

from fastllava.distributed.processes import ALONE, Processes, processes
from fastllava.errors import DiskElsewhere, ToldElsewhere, UserError


def all_well(group):
    with group.together():
        pass
    return "went on"


def one_user_error(group):
    with group.together():
        if group.rank == 1:
            raise UserError("data.images: it is so")


def both_fail(group):
    with group.together():
        raise UserError(f"of process {group.rank}")


def full_disk(group):
    with group.together():
        if group.first:
            raise OSError(28, "No space left on device", "a file")


def bug(group):
    with group.together():
        if group.rank == 1:
            raise ValueError("too many values")


def same_error(group):
    with group.first_speaks():
        raise UserError("all know")


def value_of_first(group):
    return group.on_first(lambda: {"rank": group.rank})


def first_fails(group):
    def action():
        raise UserError("output_dir: holds another run")

    return group.on_first(action)


def gathered(group):
    return group.gather(10 + group.rank)


def voted(group):
    return group.vote(None, group.rank, 5 - group.rank)


def vote_with_error(group):
    return group.vote(UserError("a picture is gone") if group.rank == 1 else None, 1)


TOLD, DISK, USER = ToldElsewhere.__name__, DiskElsewhere.__name__, UserError.__name__
# What each of two processes comes to: a value, or the class and text of an error.
EXPECTED = {
    all_well: ["went on", "went on"],
    one_user_error: [(TOLD, "data.images: it is so"), (USER, "data.images: it is so")],
    both_fail: [(USER, "of process 0"), (TOLD, "of process 0")],
    full_disk: [("OSError", "[Errno 28] No space left on device: 'a file'"), (DISK, "[Errno 28] No space left on device")],
    bug: [(TOLD, "ValueError: too many values"), ("ValueError", "too many values")],
    same_error: [(USER, "all know"), (TOLD, "all know")],
    value_of_first: [{"rank": 0}, {"rank": 0}],
    first_fails: [(USER, "output_dir: holds another run"), (TOLD, "output_dir: holds another run")],
    gathered: [[10, 11], [10, 11]],
    voted: [[1, 5], [1, 5]],
    vote_with_error: [(TOLD, "a picture is gone"), (USER, "a picture is gone")],
}


def outcome(action, group):
    """What `action` returns, or the class and text of what it raises."""
    try:
        return action(group)
    except Exception as error:
        return type(error).__name__, str(error)


def _agree(rank, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with processes() as group:
        # One after another in the same processes: after an error they still agree.
        found = [outcome(action, group) for action in EXPECTED]
    (folder / f"found.{rank}").write_text(json.dumps(found), encoding="utf-8")


def test_two_processes_come_to_one_end(tmp_path):
    torch.multiprocessing.start_processes(_agree, (tmp_path,), nprocs=2, start_method=METHOD)
    for rank in range(2):
        found = json.loads((tmp_path / f"found.{rank}").read_text(encoding="utf-8"))
        expected = json.loads(json.dumps([ends[rank] for ends in EXPECTED.values()]))
        assert dict(zip([action.__name__ for action in EXPECTED], found, strict=True)) == dict(
            zip([action.__name__ for action in EXPECTED], expected, strict=True)
        )


def test_one_that_is_alone_hears_its_own_errors():
    assert outcome(all_well, ALONE) == "went on"
    assert outcome(both_fail, ALONE) == (USER, "of process 0")
    assert outcome(same_error, ALONE) == (USER, "all know")
    assert outcome(first_fails, ALONE) == (USER, "output_dir: holds another run")
    assert (outcome(gathered, ALONE), outcome(voted, ALONE)) == ([10], [0, 5])
    with pytest.raises(UserError, match="gone"):
        ALONE.vote(UserError("gone"))
    assert ALONE.first
    assert not Processes(rank=1, world=2).first
