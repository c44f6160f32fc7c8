"""The command `fastllava mix`, as the command line takes it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastllava.errors import UserError

# Heavy imports stay inside the command, as in fastllava.cli.


def mix(
    config: Annotated[Path | None, typer.Argument(metavar="MIX.yaml", help="the mix to build, or the name of a shipped one")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder to write; must be empty or new")] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="tell how this LLaVA JSON differs from the mix, or from the published counts")
    ] = None,
) -> None:
    """Build one LLaVA JSON from annotation files: VQAv2, GQA, RefCOCO, ShareGPT and others, or your own."""
    from fastllava.console.ending import talk_to_whoever_listens
    from fastllava.mix.progress import Working

    talk_to_whoever_listens()
    if config is None and compare is None:
        raise UserError("mix: nothing to do; give a mix such as mix665k.yaml with --out DIR, or --compare FILE alone")
    if (config is None) != (out is None):
        asked = (
            "--out: is missing; write --out DIR" if out is None else "--out: nothing is built without a mix; give MIX.yaml, or leave it out"
        )
        raise UserError(asked)
    console = Console()
    working = Working(console)
    if config is not None and out is not None:
        _build(config, out, console, working)
    if compare is not None:
        _compare(compare, out, console)


def _build(config: Path, out: Path, console: Console, working: Any) -> None:
    from fastllava.config.load import shipped
    from fastllava.mix.build import build
    from fastllava.mix.config import load_mix
    from fastllava.mix.report import table

    built = build(load_mix(shipped(config) or config), out, working)
    console.print(table(built.report))
    working.say(f"{built.report['records']:,} records in {out}")


def _compare(given: Path, out: Path | None, console: Console) -> None:
    from fastllava.disk import write_json
    from fastllava.mix.build import RECORDS
    from fastllava.mix.compare import differences, kinds_in, table
    from fastllava.mix.progress import Working

    with Working(console) as working:
        kinds, broken = kinds_in(given, working)
        mine = None if out is None else kinds_in(out / RECORDS, working)[0]
    found = differences(mine, kinds, broken)
    console.print(table(found))
    if broken:
        working.say(f"{given}: {broken:,} elements are no records that fastllava prepare would take")
    if out is not None:
        write_json(out / "compare.json", found)
