"""One process of `fastllava bench gpu`: the units of a piece that it is told, one after another."""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benches.gpu.context import Context, say
from benches.gpu.pieces import PIECES
from benches.gpu.state import DeviceLost, Identity, Notebook, State
from benches.world import world

LOST = 75
"""Exit code of a process whose GPU takes no more work: the units that are left want a new one."""
PROGRAM = "import sys; from fastllava.bench import bench_module; bench_module('gpu.child').main(*sys.argv[1:])"


@dataclass(frozen=True)
class Order:
    """What a process is to do."""

    piece: str
    folder: str
    device: str
    """cpu or cuda."""
    identity: Identity
    units: Sequence[str]

    def command(self) -> list[str]:
        """That does it."""
        # -P: with the checkout itself on the import path its folder kernels/ would mislead transformers.
        return [sys.executable, "-P", "-c", PROGRAM, json.dumps(asdict(self))]

    @staticmethod
    def read(text: str) -> "Order":
        """The other way."""
        given = json.loads(text)
        return Order(**given | {"identity": Identity(**given["identity"])})


def world_command(device: str) -> list[str]:
    """Prints the world as a JSON line; a process of its own, so that the one which waits takes nothing of the GPU."""
    return [sys.executable, "-P", "-c", PROGRAM, "--world", device]


def main(first: str, second: str = "") -> None:
    """The entry point of both commands. Exits with 75 when the GPU is lost."""
    if first == "--world":
        say(json.dumps(world(torch.device(second))))
        return
    threading.Thread(target=_end_when_alone, args=(os.getppid(),), daemon=True).start()
    try:
        work(Order.read(first))
    except DeviceLost as lost:
        say(f"the GPU takes no more work from this process: {lost}")
        sys.stdout.flush()
        # The interpreter's own end would wait for the GPU.
        os._exit(LOST)


def work(order: Order) -> None:
    """Measure the units. Raises DeviceLost."""
    device, folder = torch.device(order.device), Path(order.folder)
    notebook = Notebook(State(folder, order.piece, order.identity), device)
    context = Context(device, order.identity.size, folder, notebook)
    for unit in order.units:
        say(f"--- {order.piece} {unit}")
        with notebook.unit(unit):
            PIECES[order.piece].measure(context, unit)


def _end_when_alone(parent: int) -> None:
    """A process whose parent was killed must not keep the GPU."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
