"""Processes of one run for tests: they start in a moment, from a server that has imported what they need."""

import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console

from fastllava import train
from fastllava.config import check_config

Job = tuple[dict[str, Any], int | None]
"""A config to train, and after how many steps of its own the last process gets a SIGTERM; None for never."""


def launch(count: int, action: Callable[..., None], *args: Any) -> None:
    """`action(*args)` in `count` processes with a gloo group. Raises what the first to fail raises, with its traceback."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["fastllava.train", "matplotlib.figure"])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_connected, (count, folder, action, args), nprocs=count, start_method="forkserver")


def _connected(rank: int, count: int, folder: str, action: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    action(*args)
    dist.destroy_process_group()


def run_jobs(jobs: Sequence[Job], log: Path) -> None:
    """Train the jobs one after another; what each process says goes to `log`, its rank appended."""
    honest = train.train_step
    last = dist.get_rank() == dist.get_world_size() - 1
    with open(f"{log}.{dist.get_rank()}", "w", encoding="utf-8") as said:
        for config, stop_after in jobs:
            taken = 0

            def watched(*args: Any, stop_after: int | None = stop_after) -> Any:
                nonlocal taken
                taken += 1
                if last and taken == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
                return honest(*args)

            train.train_step = watched
            train.run(check_config(config), Console(file=said, width=200))
