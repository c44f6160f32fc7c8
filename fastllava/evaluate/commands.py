"""The commands of evaluation, `fastllava answer | score | eval | report | chat`, as the command line takes them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Heavy imports stay inside the commands, as in fastllava.cli.


Judge = Annotated[str | None, typer.Option(metavar="MODEL", help="for llava_bench and mm_vet: the model that judges, by its API's name")]
BaseUrl = Annotated[str | None, typer.Option(metavar="URL", help="the judge's OpenAI-compatible address; the key is OPENAI_API_KEY's")]
JudgeRuns = Annotated[int, typer.Option(min=1, help="how often the judge judges all; figures are means")]
Rules = Annotated[Path | None, typer.Option(metavar="FILE", help="the judge's instruction, when it does not lie in the benchmark's folder")]


def score(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, ...")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="the benchmark's folder, laid out as in playground/data/eval")],
    answers: Annotated[Path, typer.Option(metavar="FILE", help="answers, one JSON object a line, from fastllava or from elsewhere")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write every figure and verdict there")] = None,
    replies: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="what a judge has said; several files, several runs")] = None,
    judge: Judge = None,
    base_url: BaseUrl = None,
    judge_runs: JudgeRuns = 1,
    rules: Rules = None,
) -> None:
    """Score stored answers to a benchmark by its official rules."""
    from fastllava.console.speaker import speaker
    from fastllava.disk import write_json
    from fastllava.evaluate.benchmarks import benchmark as named
    from fastllava.evaluate.judge import make_judge
    from fastllava.evaluate.score import as_json, notes, score_file, table

    chosen, console = named(benchmark), Console()
    say, asked = speaker(console), None
    if replies or judge is not None or base_url is not None:
        asked = make_judge(replies or (), judge, base_url, answers.with_name(f"{answers.name}.judge"), judge_runs, say)
    found = score_file(chosen, data, answers, asked, rules)
    console.print(table(chosen, found))
    for line in notes(found):
        say(line)
    if json_file is not None:
        write_json(json_file, as_json(chosen, found))
