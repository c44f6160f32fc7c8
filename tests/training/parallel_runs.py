"""Processes for tests, of one run or alone: they start in a moment, as they begin with all that the test has imported."""

import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor

from fastllava.config import check_config
from fastllava.data import loader
from fastllava.data.checks import BadRecord
from fastllava.data.images import ImageError
from fastllava.errors import UserError
from fastllava.model import compiled
from fastllava.model.llava import Llava
from fastllava.train import loop as train
from fastllava.train import machine
from fastllava.train.state import shards

# CUDA does not outlive a fork.
METHOD = "forkserver" if torch.cuda.is_available() else "fork"

Job = tuple[dict[str, Any], str | int | None]
"""A config to train, and what befalls the last process: a mishap by name, or a SIGTERM after so many steps of its own."""


def start(config: dict[str, Any], log: Path) -> BaseProcess:
    """A process that trains `config`."""
    process = torch.multiprocessing.get_context(METHOD).Process(target=_train, args=(config, log))
    process.start()
    return process


def launch(count: int, jobs: Sequence[Job], log: Path) -> None:
    """Train the jobs one after another in `count` processes of one run.

    What the k-th process says of the n-th job goes to `log`.n.k, and at its end the UserError that ended the job, if any.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_connected, (count, folder, jobs, log), nprocs=count, start_method=METHOD)


def _train(config: dict[str, Any], log: Path) -> None:
    with log.open("w", encoding="utf-8", buffering=1) as said:
        train.run(check_config(config), Console(file=said, width=1000))


def _connected(rank: int, count: int, folder: str, jobs: Sequence[Job], log: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    for number, (config, fate) in enumerate(jobs):
        own = Path(f"{log}.{number}.{rank}")
        with pytest.MonkeyPatch.context() as patch:
            # To compile takes longer than all else together.
            patch.setattr(machine, "check_compiler", lambda *_: None)
            patch.setattr(compiled, "whole_graph", _in_place_of_a_graph)
            if fate is not None and rank == count - 1:
                stop_after(patch, fate) if isinstance(fate, int) else MISHAPS[fate](patch)
            try:
                _train(config, own)
            except UserError as error:
                with own.open("a", encoding="utf-8") as said:
                    said.write(f"{type(error).__name__}: {error}\n")
    dist.destroy_process_group()


def _in_place_of_a_graph(function: Callable[..., Any], _: Any) -> Callable[..., Any]:
    """`function` of a module as it is, which must find whole weights: gathering them cannot be part of a graph."""

    def call(module: nn.Module, *args: Any) -> Any:
        sharded = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
        assert not sharded, f"in the graph of {type(module).__name__}: {sharded}"
        return function(module, *args)

    return call


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Let this process send itself a SIGTERM in its step of that number, the first being 1."""
    honest, taken = train.train_step, []

    def train_step(*args: Any) -> Any:
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*args)

    patch.setattr(train, "train_step", train_step)


def _picture_vanishes(patch: pytest.MonkeyPatch) -> None:
    honest, loaded = loader.load_image, []

    def load_image(path: Path, *args: Any) -> Any:
        loaded.append(1)
        if len(loaded) == 5:
            raise UserError("it is gone")
        return honest(path, *args)

    patch.setattr(loader, "load_image", load_image)


def _picture_is_bad(patch: pytest.MonkeyPatch) -> None:
    honest, bad = loader.load_image, []

    def load_image(path: Path, *args: Any) -> Any:
        # The fifth, whichever it is, and that one from then on.
        bad.append(path)
        if len(bad) >= 5 and path == bad[4]:
            raise ImageError(path, BadRecord("image_not_found", "there is no such file"))
        return honest(path, *args)

    patch.setattr(loader, "load_image", load_image)


def _loss_overflows(patch: pytest.MonkeyPatch) -> None:
    honest, computed = Llava.forward, []

    def forward(model: Any, batch: Any) -> Any:
        computed.append(1)
        return honest(model, batch) * (float("nan") if len(computed) == 4 else 1.0)

    patch.setattr(Llava, "forward", forward)


def _stops_in_an_answer(patch: pytest.MonkeyPatch) -> None:
    honest, asked = Llava.logits, []

    def logits(*given: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*given)

    patch.setattr(Llava, "logits", logits)


def _held_out_picture_is_bad(patch: pytest.MonkeyPatch) -> None:
    honest, bad = loader.load_image, []

    def load_image(path: Path, *args: Any) -> Any:
        # The first that is looked at without gradients, and that one from then on. Without workers it is read where it is used.
        if not torch.is_grad_enabled() and (not bad or path in bad):
            bad.append(path)
            raise ImageError(path, BadRecord("image_not_found", "there is no such file"))
        return honest(path, *args)

    patch.setattr(loader, "load_image", load_image)


def _disk_fills_up(patch: pytest.MonkeyPatch) -> None:
    def write_data(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    patch.setattr(shards.FileSystemWriter, "write_data", write_data)


MISHAPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "picture": _picture_vanishes,
    "picture gone": _picture_is_bad,
    "held-out picture gone": _held_out_picture_is_bad,
    "stop in an answer": _stops_in_an_answer,
    "loss": _loss_overflows,
    "disk": _disk_fills_up,
}
