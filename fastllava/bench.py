"""The command line of `fastllava bench`, and the way to benches/, which is no part of the installed package."""

import importlib
import sys
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from fastllava.errors import UserError

bench = typer.Typer(no_args_is_help=True, help="Measure this machine; from a checkout of the source tree.")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="config keys to change, such as optim.lr=2e-5")]


class Device(StrEnum):
    """To measure on."""

    cpu = "cpu"
    cuda = "cuda"


# What several of them take.
OnDevice = Annotated[Device | None, typer.Option("--device", help="when left out the GPU where there is one")]
Out = Annotated[Path | None, typer.Option(help="file to append to, a JSON line a row")]
Layers = Annotated[int | None, typer.Option(help="decoder layers, where all of them do not fit; the rows say so")]
Stages = Annotated[str, typer.Option(metavar="A,B", help="pretrain, finetune")]


@bench.command("kernels")
def bench_kernels(
    rooms: Annotated[list[str] | None, typer.Argument(metavar="[ROOM ...]", help="rooms to measure; all when left out")] = None,
    sizes: Annotated[str, typer.Option(metavar="A,B", help="7b, 13b, 1.1b, tower, tiny, or shapes such as 7b-5%")] = "",
    implementations: Annotated[str, typer.Option(metavar="A,B", help="implementations and peers; all when left out")] = "",
    passes: Annotated[str, typer.Option(metavar="A,B", help="forward, backward, both")] = "forward,backward,both",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; when left out bf16 on a GPU, fp32 on a CPU")] = "",
    device: OnDevice = None,
    out: Out = None,
    charts: Annotated[Path | None, typer.Option(help="folder for a chart a room")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="time to spend on a row")] = 0.5,
) -> None:
    """Time every implementation of every room and its peers, each judged against fp64 truth first. Exits with 1 if one is wrong."""
    kernels = bench_module("kernels")
    chosen = _device(device)
    plan = kernels.Plan(
        kernels.rooms_named(rooms or []),
        chosen,
        dtype or ("bf16" if chosen.type == "cuda" else "fp32"),
        *map(_names, (sizes, implementations, passes)),
        seconds=seconds,
    )
    rows = kernels.bench(plan, out, typer.echo)
    if charts is not None:
        bench_module("kernel_report").charts(rows, charts)
    if kernels.failures(rows):
        raise typer.Exit(1)


@bench.command("step")
def bench_step(
    overrides: Overrides = None,
    sizes: Annotated[str, typer.Option(metavar="A,B", help="7b, 13b, 1.1b, 150m or tiny; when left out 7b on a GPU, 150m on a CPU")] = "",
    stages: Stages = "pretrain,finetune",
    device: OnDevice = None,
    out: Out = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="time to spend on the steps of a size and stage; three at least")] = 60,
    samples: Annotated[int, typer.Option(min=0, help="of a step; 0: 8 on a CPU, 64 on a GPU")] = 0,
    layers: Layers = None,
    profile: Annotated[Path | None, typer.Option(help="file for a table of where the time of a step goes")] = None,
) -> None:
    """Time the trainer's step on random weights and samples of the true lengths, with config keys such as train.compile=layer."""
    step = bench_module("step")
    rows = step.bench(
        step.Steps(_device(device), _names(sizes), _names(stages), samples, seconds, layers, overrides or (), profile), out, typer.echo
    )
    if bench_module("peer_rows").failures(rows):
        raise typer.Exit(1)


@bench.command("peers")
def bench_peers(
    sizes: Annotated[str, typer.Option(metavar="A,B", help="7b, 13b, 1.1b, 150m or tiny; when left out 7b on a GPU, 150m on a CPU")] = "",
    stages: Stages = "finetune",
    variants: Annotated[
        str, typer.Option(metavar="A,B", help="original, transformers, transformers_recompute, transformers_liger, fastllava")
    ] = "",
    device: OnDevice = None,
    out: Out = None,
    charts: Annotated[Path | None, typer.Option(help="folder for a chart a size and stage")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="time to spend on the turns of a size and stage; three turns at least")] = 600,
    samples: Annotated[int, typer.Option(min=0, help="of a step; 0: 4 on a CPU, 32 on a GPU")] = 0,
    layers: Layers = None,
    overrides: Overrides = None,
) -> None:
    """Time a training step of fastllava, of the original's recipe and of transformers: same weights, same samples, in turns.

    Overrides are for fastllava's run, such as train.compile=layer. Exits with 1 when a variant breaks or gives another loss.
    """
    peers = bench_module("peers")
    rows = peers.bench(
        peers.Comparison.of(
            _device(device),
            *map(_names, (sizes, stages, variants)),
            samples=samples,
            seconds=seconds,
            layers=layers,
            overrides=overrides or (),
        ),
        out,
        typer.echo,
    )
    if charts is not None:
        bench_module("step_report").charts(rows, charts)
    if peers.failures(rows):
        raise typer.Exit(1)


@bench.command("ablate")
def bench_ablate(
    overrides: Overrides = None,
    toggles: Annotated[str, typer.Option(metavar="A,B", help="such as kernels.swiglu,train.recompute; all when left out")] = "",
    sizes: Annotated[str, typer.Option(metavar="A,B", help="as bench step; when left out 7b on a GPU, tiny on a CPU")] = "",
    stages: Stages = "pretrain",
    device: OnDevice = None,
    out: Out = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="time to spend on a value; three turns at least")] = 15,
    samples: Annotated[int, typer.Option(min=0, help="of a step; 0: 8 on a CPU, 32 on a GPU")] = 0,
    layers: Layers = None,
) -> None:
    """Set every toggle of a run to each other value in turn: what it changes in time, memory, loss and gradient."""
    ablate = bench_module("ablate")
    given = map(_names, (sizes, stages, toggles))
    rows = ablate.bench(ablate.Ablation(_device(device), *given, samples, seconds, layers, overrides or ()), out, typer.echo)
    if bench_module("peer_rows").failures(rows):
        raise typer.Exit(1)


@bench.command("report")
def bench_report(
    charts: Annotated[Path | None, typer.Option(help="folder for the charts of all results, such as benches/results")] = None,
) -> None:
    """Write the tables of docs/ and kernels/README.md anew from benches/results."""
    report = bench_module("report")
    for path in (*report.write(), *(report.charts(charts) if charts is not None else ())):
        typer.echo(f"wrote {path}")


@bench.command("levers")
def bench_levers(
    overrides: Overrides = None,
    levers: Annotated[str, typer.Option(metavar="A,B", help="such as train.fp8,optim.state; all when left out")] = "",
    size: Annotated[str, typer.Option(help="as bench step")] = "tiny",
    stages: Stages = "pretrain,finetune",
    device: OnDevice = None,
    out: Out = None,
    steps: Annotated[int, typer.Option(min=4, help="of each training")] = 50,
    samples: Annotated[int, typer.Option(min=1, help="of a step")] = 4,
    layers: Layers = None,
) -> None:
    """Train a little with each lever, such as train.fp8, and without: how far apart the losses are."""
    module = bench_module("levers")
    wanted = module.Levers(_device(device), size, _names(stages), _names(levers), steps, samples, layers, overrides or ())
    module.bench(wanted, out, typer.echo)


@bench.command("gpu")
def bench_gpu(
    out: Annotated[Path, typer.Option(help="folder for results, logs and the state; benches/results/NAME puts them into the tables")],
    pieces: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PIECE ...]", help="ceilings, tests, kernels, step, peers, ablate, profile, tuning, sanitizer; all"),
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="for all together; when left out 8 for each piece")] = None,
    device: OnDevice = None,
    size: Annotated[str, typer.Option(help="7b, 13b, 1.1b or tiny; when left out 7b on a GPU, tiny on a CPU")] = "",
    only: Annotated[str, typer.Option(metavar="A,B", help="of the pieces' units those with one of these words in their name")] = "",
    tests: Annotated[str, typer.Option(metavar="A,B", help="paths for piece tests; when left out those that use a GPU")] = "",
    again: Annotated[bool, typer.Option("--again", help="measure what is done already anew")] = False,
) -> None:
    """Spend some minutes on a GPU in the order of their worth: 8 at most on each piece; what is stopped goes on the next time.

    Exits with 1 when a test fails, a kernel is wrong or a piece breaks, and with 130 after Ctrl-C, with all that was measured kept.
    """
    gpu, chosen = bench_module("gpu.runner"), _device(device)
    size = size or ("7b" if chosen.type == "cuda" else "tiny")
    try:
        found = gpu.bench(gpu.Request(pieces or (), out, chosen, size, minutes, _names(only), _names(tests), again), typer.echo)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    if gpu.failed(found):
        raise typer.Exit(1)


def _names(given: str) -> list[str]:
    """Of "A,B"."""
    return [name for name in given.split(",") if name]


def _device(given: Device | None) -> Any:
    """The one that was asked for, else the GPU where there is one."""
    import torch

    return torch.device(given.value if given else "cuda" if torch.cuda.is_available() else "cpu")


def bench_module(name: str) -> Any:
    """A module of benches/, such as kernels or gpu.runner, which lies beside the package in the source tree only.

    Raises UserError where it does not.
    """
    root = Path(__file__).resolve().parents[1]
    folder = root / "benches"
    if not ((root / "pyproject.toml").is_file() and (folder / f"{name.replace('.', '/')}.py").is_file()):
        raise UserError("fastllava bench: the benches come with the source tree, not with the installed package; install from a checkout")
    if "benches" not in sys.modules:
        # By its place: with the root on the import path the folder kernels/ would be importable, and mislead transformers.
        package = ModuleType("benches")
        package.__path__ = [str(folder)]
        sys.modules["benches"] = package
    return importlib.import_module(f"benches.{name}")
