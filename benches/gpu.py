"""`fastllava bench gpu`: for someone who has a GPU for minutes, the other commands in the order of their worth.

A piece is a short list of commands that can be given by hand too. It takes at most 8 minutes and writes its rows to DIR/<piece>.jsonl and
what its commands print to DIR/<piece>.log. What is stopped goes on the next time: DIR/<piece>.state says which commands have ended, and the
commands leave out the rows that are there. With DIR = benches/results/NAME `fastllava bench report` puts the rows into the tables.
"""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from benches.ablate import choices
from benches.lib.request import STAGES
from benches.lib.results import Say
from benches.lib.unattended import NOT_STARTED, Command, Outcome, Piece, environment, program
from benches.lib.world import SOURCES, code_of, device_name
from benches.tests import TESTED
from fastllava.errors import UserError
from fastllava_kernels import rooms
from fastllava_kernels._tuning import tuning
from fastllava_kernels.llava15 import DECODERS

LIMIT = 480.0
"""Seconds of a piece."""
LEAST = 30.0
"""Seconds left from which a piece is begun; of a budget that is shorter, half of it."""
FIRST_ROOMS = ("masked_linear_cross_entropy", "projector_splice", "attention")
"""What is looked at first: what has a target, and what takes the most time."""
LATER_SHARES = ("-1%", "-50%", "-100%")
"""Shares of supervised tokens that no stage has."""


@dataclass(frozen=True)
class Request:
    """What to measure."""

    pieces: Sequence[str]
    """All when empty; in the order of PIECES, whatever the order here."""
    folder: Path
    device: str
    """cpu or cuda."""
    size: str
    minutes: float | None = None
    tests: Sequence[str] = ()
    """Paths for piece `tests`; its own when empty."""
    again: bool = False

    def check(self) -> None:
        """Raises UserError for what is nothing to measure."""
        for name in self.pieces:
            if name not in PIECES:
                raise UserError(f"bench gpu: '{name}' is no piece; write some of {', '.join(PIECES)}")
        if self.size not in DECODERS:
            raise UserError(f"--size: '{self.size}' is none of {', '.join(DECODERS)}")

    def spend(self, seconds: float) -> tuple[str, str]:
        """The option for a budget; on a CPU, where only whether it runs is of interest, of none."""
        return "--seconds", str(seconds if self.device == "cuda" else 0)

    def steps(self, command: str, stages: str, samples: int, seconds: float, *words: str) -> tuple[str, ...]:
        """A command over whole steps, with as many decoder layers as fit."""
        few = str(samples if self.device == "cuda" else max(2, samples // 16))
        return (command, *words, "--sizes", self.size, "--stages", stages, "--samples", few, *self.spend(seconds), "--fit")


def ceilings(request: Request) -> Iterator[Command]:
    """The machine, and what it gives at best."""
    yield Command(("ceilings", *request.spend(1.0)))


def tests(request: Request) -> Iterator[Command]:
    """The tests that use a GPU, all failures collected."""
    yield Command(("tests", *request.tests))


def kernels(request: Request) -> Iterator[Command]:
    """Every room and its peers at the shapes of the size; where that breaks off, room by room and implementation by implementation.

    At 7b 25 shapes give about 440 rows. At 0.2 s each that is 90 s, beside about 220 s in which torch.compile and Triton make code, and
    30 s of judging: predicted, 6 of the 8 minutes.
    """

    def command(names: Sequence[str], later: bool, parts: tuple[Command, ...], *words: str) -> Command:
        shapes = [
            shape for name in names for shape in _shapes(name, request.size) if shape.removesuffix("-head").endswith(LATER_SHARES) is later
        ]
        return Command(("kernels", *names, "--sizes", ",".join(dict.fromkeys(shapes)), *words, *request.spend(0.2)), parts)

    def whole(name: str, later: bool) -> Command:
        return command(
            [name], later, tuple(command([name], later, (), "--implementations", each) for each in rooms()[name].implementations)
        )

    names = sorted(rooms(), key=lambda name: FIRST_ROOMS.index(name) if name in FIRST_ROOMS else len(FIRST_ROOMS))
    yield command(names, False, tuple(whole(name, False) for name in names))
    later = [name for name in names if any(shape.endswith(LATER_SHARES) for shape in _shapes(name, request.size))]
    yield from (whole(name, True) for name in later)


def _shapes(room: str, size: str) -> list[str]:
    """Its shapes of the size. Shapes of the tower are the same beside every decoder."""
    return [name for name in rooms()[room].workload.shapes if name.partition("-")[0] in (size, "tower" if size != "tiny" else size)]


def step(request: Request) -> Iterator[Command]:
    """Our steps. Predicted at 7b: 45 s each, of which 10 to build, 12 to warm up and weigh, 20 timed."""
    selective, layer = "train.recompute=selective", "train.compile=layer"
    settings: Sequence[tuple[str, ...]] = (
        *((), (selective,), (layer,), (layer, selective)),
        *(("train.recompute=full",), ("train.recompute=norms",)),
    )
    found = [(stage, words) for words in settings for stage in STAGES]
    # Where the decoder is frozen a step that keeps everything fits, and recomputing can only take longer.
    for stage, words in sorted(found, key=lambda each: each[0] == "pretrain" and "recompute" in "".join(each[1])):
        yield Command(request.steps("step", stage, 64, 20, *words))


def peers(request: Request) -> Iterator[Command]:
    """Our steps and others' in turns; stage 2 first, as it has the larger share of a training. Predicted at 7b: 200 s each."""
    for stage in sorted(STAGES):
        yield Command(request.steps("peers", stage, 32, 120))


def ablate(request: Request) -> Iterator[Command]:
    """Every toggle. At most 8 layers: one is like any other, and two runs are kept at once. Predicted at 7b: 10 s a toggle."""

    def command(stage: str, keys: Sequence[str], parts: tuple[Command, ...] = ()) -> Command:
        layers = ("--layers", "8") if request.device == "cuda" else ()
        return Command((*request.steps("ablate", stage, 32, 3), *layers, "--toggles", ",".join(keys)), parts)

    keys = [key for key in dict.fromkeys(key for key, _ in choices(torch.device("cpu"))) if not key.startswith("parallel.")]
    for stage in STAGES:
        yield command(stage, keys, tuple(command(stage, [key]) for key in keys))


def profile(request: Request) -> Iterator[Command]:
    """Where a step's time goes."""
    for words in ((), ("train.compile=layer",)):
        for stage in STAGES:
            yield Command((*request.steps("step", stage, 64, 0, *words), "--profile", str(request.folder)))


def tuning_of_kernels(request: Request) -> Iterator[Command]:
    """The tables of kernel configurations."""

    def command(*names: str, parts: tuple[Command, ...] = ()) -> Command:
        return Command(("tuning", *names, "--size", request.size, "--tables", str(request.folder / "tables")), parts)

    yield command(parts=tuple(command(name) for name in tuning.kernels()))


def sanitizer(request: Request) -> Iterator[Command]:
    """compute-sanitizer over the kernels."""
    yield Command(("sanitizer",))


PIECES: dict[str, Callable[[Request], Iterator[Command]]] = {
    "ceilings": ceilings,
    "tests": tests,
    "kernels": kernels,
    "step": step,
    "peers": peers,
    "ablate": ablate,
    "profile": profile,
    "tuning": tuning_of_kernels,
    "sanitizer": sanitizer,
}
"""In the order of their worth."""


def bench(request: Request, say: Say) -> list[Outcome]:
    """Measure what is asked for, as far as the time goes. Raises UserError on unknown names, KeyboardInterrupt after Ctrl-C or SIGTERM."""
    request.check()
    request.folder.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.monotonic(), []
    device = device_of(request)
    with _stops_as_ctrl_c():
        for name in (name for name in PIECES if name in (request.pieces or PIECES)):
            identity = {"code": code_of(TESTED if name == "tests" else SOURCES), "device": device}
            piece = Piece(name, list(PIECES[name](request)), request.folder, request.device, identity, say)
            if request.again:
                piece.set_aside()
            left = LIMIT if request.minutes is None else min(LIMIT, 60 * request.minutes - (time.monotonic() - began))
            if request.minutes is not None and piece.todo() and left < min(LEAST, 30 * request.minutes):
                outcomes.append(Outcome(name, NOT_STARTED, "no time left"))
                continue
            summary = str(PIECES[name].__doc__).partition(".")[0]
            say(f"{name}: {summary}; at most {left / 60:.1f} min; {piece.log.name}, {piece.rows.name}")
            outcomes.append(piece.run(left))
    width = max(len(outcome.piece) for outcome in outcomes)
    for each in outcomes:
        say(f"{each.piece:{width}}  {each.status:{len(NOT_STARTED)}}  {each.seconds:6.0f} s  {each.words}")
    return outcomes


def device_of(request: Request) -> str:
    """The device in words. A GPU's is said by another process, as the one that waits must take nothing of it.

    Raises UserError where there is none.
    """
    if request.device == "cpu":
        return device_name(torch.device("cpu"))
    done = subprocess.run(
        program(["world", "--device", request.device]), capture_output=True, text=True, env=environment(request.device), check=False
    )
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), "no message")
        raise UserError(last.removeprefix("error: "))
    return json.loads(done.stdout.strip().splitlines()[-1])["device"]


@contextmanager
def _stops_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, such as of `timeout`, is treated as Ctrl-C is: the state is written and the command's process ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
