"""The commands of evaluation, `fastllava answer | score | eval | report | chat`, as the command line takes them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Heavy imports stay inside the commands, as in fastllava.cli.


def score(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, ...")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="the benchmark's folder, laid out as in playground/data/eval")],
    answers: Annotated[Path, typer.Option(metavar="FILE", help="answers, one JSON object a line, from fastllava or from elsewhere")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write every figure and verdict there")] = None,
) -> None:
    """Score stored answers to a benchmark by its official rules."""
    from fastllava.console.speaker import speaker
    from fastllava.disk import write_json
    from fastllava.evaluate.benchmarks import benchmark as named
    from fastllava.evaluate.score import as_json, score_file, table, warnings

    chosen = named(benchmark)
    found = score_file(chosen, data, answers)
    console = Console()
    console.print(table(chosen, found))
    for line in warnings(found):
        speaker(console)(line)
    if json_file is not None:
        write_json(json_file, as_json(chosen, found))
