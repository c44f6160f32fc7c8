"""The command line, `fastllava COMMAND`: training, planning, export and what is asked of it here; evaluation in `evaluate.commands`."""

import io
import json
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.padding import Padding

from fastllava import __version__
from fastllava.config import load_config
from fastllava.console.ending import end_soon, talk_to_whoever_listens
from fastllava.console.masking import masked
from fastllava.console.printable import printable
from fastllava.console.stopping import ends_imports, second_signal_ends
from fastllava.errors import DiskElsewhere, ToldElsewhere, UserError, first_of_machine_speaks
from fastllava.evaluate import commands as evaluation
from fastllava.mix.command import mix

# Heavy imports stay inside the commands: --help and a wrong key should answer at once.

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Train LLaVA-1.5, both stages.")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML config, or the name of a shipped one")]

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="config keys to change, such as optim.lr=2e-5")]


class Layout(StrEnum):
    """The layout of a written checkpoint."""

    hf = "hf"
    llava = "llava"
    peft = "peft"


class Merge(StrEnum):
    """How adapters are merged."""

    fp32 = "fp32"
    fp16 = "fp16"


class Format(StrEnum):
    """The format of what inspect prints."""

    text = "text"
    jsonl = "jsonl"


class Truth(StrEnum):
    """Precision that a certificate calls true."""

    fp32 = "fp32"
    fp64 = "fp64"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("demo"),
    lora: Annotated[bool, typer.Option("--lora", help="stage 2 trains adapters in place of the language model")] = False,
) -> None:
    """Train both stages on pictures drawn here, then answer questions about pictures the model has not seen."""
    talk_to_whoever_listens()
    from fastllava.demo.run import demo as run_demo

    run_demo(out, lora=lora)


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check and tokenise the records once; bad ones go to quarantine.jsonl with a reason."""
    talk_to_whoever_listens()
    from fastllava.console.speaker import speaker
    from fastllava.distributed.processes import ALONE
    from fastllava.train.dataset import prepare_data
    from fastllava.train.template import with_template
    from fastllava.train.watch.watchdog import Watchdog

    say = speaker(Console())
    checked = with_template(load_config(config, overrides or ()), say)
    with Watchdog(checked.train.watchdog_seconds, ALONE, checked.data.workers) as watch:
        _, _, prepared = prepare_data(checked, say, watch.board)
    say(f"{len(prepared):,} samples in {prepared.folder}")


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train one stage. Prepares the data when needed; goes on where it stopped when output_dir holds the run."""
    talk_to_whoever_listens()
    with first_of_machine_speaks():
        checked = load_config(config, overrides or ())
    from fastllava.train import run

    result = run(checked)
    if result.stopped_by is not None:
        # The shell's convention for a stop by signal, so that `train A && train B` does not go on.
        raise typer.Exit(128 + result.stopped_by)


@app.command("config")
def config_command(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the config as a run reads it: every key, with the stage's defaults and what is changed here."""
    from fastllava.config.load import resolved

    sys.stdout.write(resolved(load_config(config, overrides or ())))


@app.command("plan")
def plan_command(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG... [key=value ...]", help="one config a stage, then keys to change")],
    gpu: Annotated[str, typer.Option(help="a100-40g, a100-80g, h100-80g, h100-pcie, h200, l40s-48g, rtx6000ada-48g or rtx4090-24g")],
    world: Annotated[int, typer.Option(min=1, help="GPUs of the run")] = 8,
    drawn: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="N samples with lengths as in LLaVA-1.5's sets, in place of data.records; 0: all of them"),
    ] = None,
    size: Annotated[
        str,
        typer.Option(metavar="7b|13b|...", help="a model of this size, in place of the folders of model.llm and model.vision_tower"),
    ] = "",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the plan there too")] = None,
) -> None:
    """Foresee memory, time and their limit for a run on GPUs that are not here; no weight is read."""
    from fastllava.console.speaker import speaker
    from fastllava.model.weights import read_origin
    from fastllava.planner.drawn import draw_like
    from fastllava.planner.gpus import gpu_named
    from fastllava.planner.plan import plan_stage
    from fastllava.planner.report import as_json, lines
    from fastllava.planner.sizes import write_configs
    from fastllava.train.dataset import prepare_data
    from fastllava.train.template import with_template

    say, chosen = speaker(Console()), gpu_named(gpu)
    overrides = [word for word in configs if "=" in word]
    if size and drawn is None:
        raise UserError("--size: a size without its folders has no tokenizer for data.records; write --drawn 0 too")
    found = []
    with TemporaryDirectory() as folder:
        if size:
            overrides += write_configs(size, Path(folder))
        for path in (word for word in configs if "=" not in word):
            config = load_config(Path(path), overrides)
            if drawn is None:
                config = with_template(config, say)
                _, _, lengths = prepare_data(config, say)
            else:
                lengths = draw_like(config.stage, drawn, read_origin(config.model))
            found.append(plan_stage(config, lengths, chosen, world))
            for line in lines(found[-1]):
                say(line)
    if len(found) > 1 and (hours := [stage.hours for stage in found if stage.hours is not None]):
        say(f"all stages: {sum(hours):.1f} h, {world * sum(hours):.0f} GPU-hours (predicted)")
    if json_file is not None:
        json_file.write_text(json.dumps([as_json(stage) for stage in found], indent=2) + "\n", encoding="utf-8")


@app.command()
def certify(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="steps to look at, spread over the run")] = 2,
    samples: Annotated[int, typer.Option(min=0, help="samples of each step; 0 for all")] = 16,
    padded_batch: Annotated[int, typer.Option(min=1, help="samples of a padded batch of plain PyTorch")] = 2,
    truth: Annotated[Truth | None, typer.Option(help="when left out fp64 on a CPU and for a run in fp32, else fp32")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for certificate.txt and .json; output_dir when left out")] = None,
) -> None:
    """Hold this run's loss and gradients to plain PyTorch's, on its own data and weights. Exits with 1 when they differ."""
    talk_to_whoever_listens()
    with first_of_machine_speaks():
        checked = load_config(config, overrides or ())
        from fastllava.certify.run import certify as run_certify
        from fastllava.console.speaker import speaker

        given = None if truth is None else truth.value
        certificate = run_certify(
            checked, speaker(Console()), n_steps=steps, n_samples=samples, padded_batch=padded_batch, truth=given, out=out
        )
    if not certificate.holds:
        raise typer.Exit(1)


@app.command()
def inspect(
    records: Annotated[Path, typer.Argument(metavar="RECORDS.json", help="LLaVA JSON, or one record a line")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer folder or file")],
    template: Annotated[str, typer.Option(help="conversation template, such as plain or v1")],
    legacy: Annotated[
        str | None,
        typer.Option(metavar="true|false", help="sentencepiece's legacy pieces; as the tokenizer's config says when left out"),
    ] = None,
    format: Annotated[Format, typer.Option(help="text to read, jsonl for programs")] = Format.text,
    max_tokens: Annotated[int, typer.Option(min=2, help="as data.max_tokens")] = 2048,
    max_images: Annotated[int, typer.Option(min=1, help="as data.max_images")] = 1,
) -> None:
    """Show what the records become: ids, and which of them are supervised."""
    from fastllava.data.inspect import inspect_records, render_text
    from fastllava.train.dataset import load_tokenizer

    if legacy not in (None, "true", "false"):
        raise UserError(f"--legacy: '{legacy}' is neither true nor false")
    loaded = load_tokenizer(tokenizer, None if legacy is None else legacy == "true", "--tokenizer")
    if format is Format.jsonl:
        for row in inspect_records(records, loaded, template, max_tokens, max_images):
            sys.stdout.write(json.dumps(row) + "\n")
    else:
        for block in render_text(records, loaded, template, max_tokens, max_images):
            Console().print(block)


@app.command()
def export(
    checkpoint: evaluation.Checkpoint,
    layout: Annotated[
        Layout,
        typer.Option(help="hf: LlavaForConditionalGeneration; llava: the original code; peft: adapters for PEFT on llava-hf"),
    ],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or new")],
    merge: Annotated[
        Merge | None,
        typer.Option(help="of adapters: in fp32 and rounded once, or all in fp16 as the original does; fp32 when left out"),
    ] = None,
    base: evaluation.Base = None,
) -> None:
    """Write a checkpoint that other tools load, read it back and compare. Adapters are merged, but for layout peft."""
    talk_to_whoever_listens()
    from fastllava.console.speaker import speaker
    from fastllava.export import export as run_export

    run_export(checkpoint, layout.value, out, speaker(Console()), merge=None if merge is None else merge.value, base=base)


app.command()(evaluation.answer)
app.command()(evaluation.score)
app.command("eval")(evaluation.evaluate)
app.command()(evaluation.chat)
app.command()(evaluation.report)
app.command()(mix)


@app.command()
def toggles() -> None:
    """List every toggle, which changes the order of additions at most: its values, what runs here by default, and why."""
    from fastllava.config.toggles import kernel_toggles, train_toggles

    console = Console()
    for toggle in (*train_toggles(), *kernel_toggles()):
        console.print(f"[bold]{toggle.key}[/bold]: {toggle.default}")
        for line in (f"one of {', '.join(toggle.values)}", *toggle.why):
            console.print(Padding(line, (0, 0, 0, 4)), highlight=False, markup=False)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(context: typer.Context) -> None:
    """Measure this machine, from a checkout of the source tree: kernels, step, peers, ablate, levers, gpu, report."""
    program = Path(__file__).resolve().parents[1] / "benches" / "__main__.py"
    if not program.is_file():
        raise UserError("fastllava bench: the benches come with the source tree, not with the installed package; install from a checkout")
    sys.stdout.flush()
    # In place of this process, so that its signals and its exit code are the benches' own. -P: that folder must not be imported from.
    os.execv(sys.executable, [sys.executable, "-P", str(program), *context.args])  # noqa: S606


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. A user's mistake is one line on stderr and exit code 2, never a traceback; README lists the codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # A terminal that knows ASCII alone gets the rest as escapes.
            stream.reconfigure(errors="backslashreplace")
    ends_imports()
    with second_signal_ends():
        try:
            app()
        except SystemExit as error:
            _leave(error.code if isinstance(error.code, int) else int(bool(error.code)))
        except (ToldElsewhere, DiskElsewhere):
            _leave(2)
        except UserError as error:
            _leave(130 if _interrupted(error) else 2, *(f"error: {line}" for line in printable(masked(str(error))).splitlines()))
        except OSError as error:
            _leave(2, f"error: {printable(str(error))}; free space or give access there, and start the same command again")
        except KeyboardInterrupt:
            _leave(130, "interrupted")
        except Exception as error:
            if _interrupted(error):
                _leave(130, "interrupted")
            _leave(1, printable(masked(traceback.format_exc().rstrip())))


def _interrupted(error: BaseException) -> bool:
    """Whether a Ctrl-C is behind `error`: a library that it hit while it was being imported raises an error of its own."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, KeyboardInterrupt):
            return True
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return False


def _leave(code: int, *lines: str) -> NoReturn:
    if code:
        end_soon(code)
    for line in lines:
        sys.stderr.write(f"{line}\n")
    raise SystemExit(code)
