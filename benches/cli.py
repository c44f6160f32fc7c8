"""The commands of `fastllava bench`, which starts them as a process of their own."""

import json
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fastllava.errors import UserError

# Heavy imports stay inside the commands: --help should answer at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure this machine; from a checkout of the source tree.",
)

BROKE = 70
"""Exit code after a fault of ours, where 1 says that something measured is wrong."""


class Device(StrEnum):
    """The device to measure on."""

    cpu = "cpu"
    cuda = "cuda"


# What several of them take.
OnDevice = Annotated[Device | None, typer.Option("--device", help="when left out the GPU where there is one")]
Out = Annotated[Path | None, typer.Option(help="file to append to, a JSON line a row")]
Lora = Annotated[bool, typer.Option("--lora", help="adapters of rank 128 in place of the decoder, in stage finetune")]
Resume = Annotated[
    bool, typer.Option("--resume", help="leave out the rows that this code has left in --out, and name the code in new ones")
]
Layers = Annotated[int | None, typer.Option(help="decoder layers, where all of them do not fit; the rows say so")]
Fit = Annotated[bool, typer.Option("--fit", help="as many decoder layers as fit, --layers at most; the rows say how many")]
Stages = Annotated[str, typer.Option(metavar="A,B", help="pretrain, finetune")]
Sizes = Annotated[str, typer.Option(metavar="A,B", help="7b, 13b, 1.1b, 150m or tiny; when left out 7b on a GPU")]
Seconds = Annotated[float, typer.Option(min=0.0, help="time to spend on a size and stage, or on a value of ablate; three turns at least")]
Samples = Annotated[int, typer.Option(min=0, help="samples of a step; when 0 what suits the device")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="config keys to change, such as optim.lr=2e-5")]
Charts = Annotated[Path | None, typer.Option(help="folder for charts")]


_RECIPE_OF_LORA = ("lora.rank=128", "lora.alpha=256", "optim.projector_lr=2e-5")


@app.command()
def kernels(
    rooms: Annotated[list[str] | None, typer.Argument(metavar="[ROOM ...]", help="rooms to measure; all when left out")] = None,
    sizes: Annotated[str, typer.Option(metavar="A,B", help="7b, 13b, 1.1b, tower, tiny, or shapes such as 7b-5%")] = "",
    implementations: Annotated[str, typer.Option(metavar="A,B", help="implementations and peers; all when left out")] = "",
    passes: Annotated[str, typer.Option(metavar="A,B", help="forward, backward, both")] = "forward,backward,both",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; when left out bf16 on a GPU, fp32 on a CPU")] = "",
    device: OnDevice = None,
    out: Out = None,
    charts: Charts = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="time to spend on a row")] = 0.5,
    resume: Resume = False,
) -> None:
    """Time every implementation of every room and its peers, each judged against fp64 truth first. Exits with 1 if one is wrong."""
    from benches import kernels as module

    where = _device(device)
    dtype = dtype or ("bf16" if where.type == "cuda" else "fp32")
    shapes, wanted, directions = map(_names, (sizes, implementations, passes))
    plan = module.Plan(module.rooms_named(rooms or []), where, dtype, shapes, wanted, directions, seconds)
    _end(module.bench(plan, _sheet(out, resume)), charts, "kernels")


@app.command()
def step(
    overrides: Overrides = None,
    lora: Lora = False,
    sizes: Sizes = "",
    stages: Stages = "",
    device: OnDevice = None,
    out: Out = None,
    seconds: Seconds = 60,
    samples: Samples = 0,
    layers: Layers = None,
    fit: Fit = False,
    profile: Annotated[
        Path | None, typer.Option(help="folder for where the time of a step goes: a table, rows, and the trace if small")
    ] = None,
    resume: Resume = False,
) -> None:
    """Time the trainer's step on random weights and samples of the true lengths, with config keys such as train.compile=layer."""
    from benches import step as module

    stages = stages or ("finetune" if lora else "pretrain,finetune")
    overrides = [*(_RECIPE_OF_LORA if lora else ()), *(overrides or [])]
    request = _request(device, sizes, ("7b", "150m"), stages, samples, (64, 8), seconds, layers, overrides, fit)
    _end(module.bench(request, _sheet(out, resume), profile))


@app.command()
def peers(
    sizes: Sizes = "",
    stages: Stages = "finetune",
    variants: Annotated[
        str, typer.Option(metavar="A,B", help="original, transformers, transformers_recompute, transformers_liger, fastllava")
    ] = "",
    device: OnDevice = None,
    out: Out = None,
    charts: Charts = None,
    seconds: Seconds = 600,
    samples: Samples = 0,
    layers: Layers = None,
    fit: Fit = False,
    lora: Lora = False,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Time a training step of fastllava, of the original's recipe and of transformers: same weights, same samples, in turns.

    Config keys are for fastllava's run, such as train.compile=layer. Exits with 1 when a variant breaks or gives another loss.
    With --lora transformers has PEFT's adapters, and nothing is dropped, since each would drop other values.
    """
    from benches.peers import compare

    overrides = [*((*_RECIPE_OF_LORA, "lora.dropout=0") if lora else ()), *(overrides or [])]
    request = _request(device, sizes, ("7b", "150m"), stages, samples, (32, 4), seconds, layers, overrides, fit)
    _end(compare.bench(request, _sheet(out, resume), _names(variants)), charts, "peers")


@app.command()
def ablate(
    overrides: Overrides = None,
    toggles: Annotated[str, typer.Option(metavar="A,B", help="such as kernels.swiglu,train.recompute; all when left out")] = "",
    sizes: Sizes = "",
    stages: Stages = "pretrain",
    device: OnDevice = None,
    out: Out = None,
    seconds: Seconds = 15,
    samples: Samples = 0,
    layers: Layers = None,
    fit: Fit = False,
    resume: Resume = False,
) -> None:
    """Set every toggle of a run to each other value in turn: what it changes in time, memory, loss and gradient."""
    from benches import ablate as module

    request = _request(device, sizes, ("7b", "tiny"), stages, samples, (32, 8), seconds, layers, overrides, fit)
    _end(module.bench(request, _sheet(out, resume), _names(toggles)))


@app.command()
def levers(
    overrides: Overrides = None,
    levers: Annotated[str, typer.Option(metavar="A,B", help="such as train.fp8,optim.state; all when left out")] = "",
    size: Annotated[str, typer.Option(help="as bench step")] = "tiny",
    stages: Stages = "pretrain,finetune",
    device: OnDevice = None,
    out: Out = None,
    steps: Annotated[int, typer.Option(min=4, help="steps of each training")] = 50,
    samples: Annotated[int, typer.Option(min=1, help="samples of a step")] = 4,
    layers: Layers = None,
) -> None:
    """Train a little with each lever, such as train.fp8, and without: how far apart the losses are."""
    from benches import levers as module

    request = _request(device, size, (size, size), stages, samples, (samples, samples), 0.0, layers, overrides, False)
    module.bench(request, _sheet(out, False), _names(levers), steps)


@app.command()
def ceilings(
    device: OnDevice = None,
    out: Out = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="time to spend on a product")] = 1.0,
    resume: Resume = False,
) -> None:
    """Time matrix products of a training's sizes and a copy: the most that this machine gives."""
    from benches import ceilings as module

    module.bench(_device(device), _sheet(out, resume), seconds)


@app.command("tests")
def run_tests(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH ...]", help="tests to run; when left out those that use a GPU")
    ] = None,
    device: OnDevice = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Run the tests that use a GPU, a row each. Exits with 1 when one fails, and with 75 when one has left the GPU unusable."""
    from benches import tests as module

    raise typer.Exit(module.bench(_device(device), _sheet(out, resume, sources=module.TESTED), paths or []))


@app.command()
def tuning(
    tables: Annotated[Path, typer.Option(help="folder for the tables")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[KERNEL ...]", help="kernels to tune; all when left out")] = None,
    size: Annotated[str, typer.Option(help="7b, 13b, 1.1b or tiny")] = "7b",
    device: OnDevice = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Time every configuration of every Triton kernel, and write the fastest into tables."""
    from benches import tuning as module

    module.bench(_device(device), _sheet(out, resume), tables, size, names or [])


@app.command()
def sanitizer(
    rooms: Annotated[list[str] | None, typer.Argument(metavar="[ROOM ...]", help="rooms to look at; all when left out")] = None,
    device: OnDevice = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Run every room's Triton kernels under compute-sanitizer. Exits with 1 when it finds an error."""
    from benches import sanitizer as module

    if wrong := module.wrong(module.bench(_device(device), _sheet(out, resume), rooms or [])):
        _fail(f"{wrong[0]['check']} {wrong[0]['room']}: {wrong[0]['void'] or next(iter(wrong[0]['first']), 'errors')}")


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="folder for results, logs and the state; benches/results/NAME puts them into the tables")],
    pieces: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PIECE ...]", help="ceilings, tests, kernels, step, peers, ablate, profile, tuning, sanitizer; all"),
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="for all together; when left out 8 for each piece")] = None,
    device: OnDevice = None,
    size: Annotated[str, typer.Option(help="7b, 13b, 1.1b or tiny; when left out 7b on a GPU, tiny on a CPU")] = "",
    tests: Annotated[str, typer.Option(metavar="A,B", help="paths for piece tests; when left out those that use a GPU")] = "",
    again: Annotated[
        bool, typer.Option("--again", help="measure anew what is done already; the old rows move to a folder of their own")
    ] = False,
) -> None:
    """Spend some minutes on a GPU in the order of their worth: 8 at most on each piece; what is stopped goes on the next time.

    Exits with 1 when a test fails, a kernel is wrong or a piece breaks, and with 130 after Ctrl-C, with all that was measured kept.
    """
    from benches import gpu as module
    from benches.lib.unattended import failed

    where = _device(device).type
    request = module.Request(pieces or (), out, where, size or ("7b" if where == "cuda" else "tiny"), minutes, _names(tests), again)
    try:
        found = module.bench(request, typer.echo)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(int(failed(found)))


@app.command()
def budget(
    write: Annotated[Path | None, typer.Option(help="file to write the tables to, such as kernels/budget.md")] = None,
    check: Annotated[Path | None, typer.Option(help="file to compare with")] = None,
) -> None:
    """Count what a decoder layer and every Triton kernel move, beside the least. Exits with 1 on a room over its limit or a stale table."""
    from benches import budget as module

    found = module.count()
    problems, table = found.problems(), found.render()
    if write is not None:
        write.write_text(table, encoding="utf-8")
    elif check is None:
        typer.echo(table, nl=False)
    elif changed := module.differences(check.read_text(encoding="utf-8"), table):
        problems += [f"{check} is out of date, write it anew with --write:", *changed]
    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(int(bool(problems)))


@app.command()
def host(out: Out = None) -> None:
    """Microseconds of the host for a call of an op, without what computes it. No GPU."""
    from benches import host as module

    module.bench(_sheet(out, resume=False))


@app.command()
def report(
    charts: Annotated[Path | None, typer.Option(help="folder for the charts of all results, such as benches/results")] = None,
) -> None:
    """Write the generated tables of the documentation anew from benches/results."""
    from benches import report as module

    for path in (*module.write(), *(module.charts_of_results(charts) if charts is not None else ())):
        typer.echo(f"wrote {path}")


@app.command(hidden=True)
def world(device: OnDevice = None) -> None:
    """Print what rows say of the machine, in a process of its own."""
    from benches.lib import world as module

    module.check_device(_device(device))
    typer.echo(json.dumps(module.world(_device(device))))


@app.command(hidden=True)
def launch(room: str, device: Device, dtype: str) -> None:
    """Launch a room's Triton kernels, for compute-sanitizer to watch."""
    from benches.sanitizer import launch as launch_kernels

    launch_kernels(room, device.value, dtype)


def _names(given: str) -> list[str]:
    """The names in "A,B"."""
    return [name for name in given.split(",") if name]


def _device(given: Device | None) -> Any:
    """The device that was asked for, else the GPU where there is one."""
    import torch

    return torch.device(given.value if given else "cuda" if torch.cuda.is_available() else "cpu")


def _sheet(out: Path | None, resume: bool, **sources: Any) -> Any:
    from benches.lib.results import Sheet

    return Sheet(out, typer.echo, resume, **sources)


def _request(
    device: Device | None, sizes: str, else_sizes: tuple[str, str], stages: str, samples: int, else_samples: tuple[int, int],
    seconds: float, layers: int | None, overrides: list[str] | None, fit: bool,
) -> Any:  # fmt: skip
    """The request; of what is left out, the first of the pair on a GPU and the second on a CPU."""
    from benches.lib.request import Request

    where = _device(device)
    at = 0 if where.type == "cuda" else 1
    names = _names(sizes) or [else_sizes[at]]
    return Request(where, names, _names(stages), samples or else_samples[at], seconds, layers, overrides or (), fit)


def _end(rows: list[dict[str, Any]], charts: Path | None = None, kind: str = "") -> None:
    """Draw, and exit with 1 where a row of ours is wrong."""
    from benches.lib.results import failures, named

    if charts is not None:
        from benches.report import CHARTS

        CHARTS[kind](rows, charts)
    if wrong := failures(rows):
        _fail(f"{named(wrong[0])}: {wrong[0]['void']}")


def _fail(line: str) -> NoReturn:
    """Say what is wrong in the last line, and exit with 1."""
    typer.echo(line, err=True)
    raise typer.Exit(1)


def main() -> None:
    """Run a command. A user's mistake is one line on stderr and exit code 2; 130 after Ctrl-C."""
    try:
        app(prog_name="fastllava bench")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(BROKE) from None
