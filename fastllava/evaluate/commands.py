"""The commands of evaluation, `fastllava answer | score | eval | report | chat`, as the command line takes them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastllava.errors import UserError

# Heavy imports stay inside the commands, as in fastllava.cli.

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="output_dir, checkpoint-N, a whole LLaVA checkpoint, or LoRA adapters of one")
]
Base = Annotated[
    Path | None, typer.Option(metavar="DIR", help="the model that CHECKPOINT was trained from, where that is not where CHECKPOINT says")
]
TemplateName = Annotated[str | None, typer.Option(help="conversation template; the one it was trained with when left out")]
BatchSize = Annotated[int, typer.Option(min=1, help="questions at a time; of engine transformers")]
EngineName = Annotated[str, typer.Option(help="transformers or vllm")]
Precision = Annotated[str, typer.Option(help="fp32, bf16, fp16; auto: the checkpoint's own, and fp32 on a CPU")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave out questions whose image is missing or damaged")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="an answer is cut here")]
Judge = Annotated[str | None, typer.Option(metavar="MODEL", help="for llava_bench and mm_vet: the model that judges, by its API's name")]
BaseUrl = Annotated[str | None, typer.Option(metavar="URL", help="the judge's OpenAI-compatible address; the key is OPENAI_API_KEY's")]
JudgeRuns = Annotated[int, typer.Option(min=1, help="how often the judge judges all; figures are means")]
Rules = Annotated[Path | None, typer.Option(metavar="FILE", help="the judge's instruction, when it does not lie in the benchmark's folder")]


def answer(
    checkpoint: Checkpoint,
    questions: Annotated[Path, typer.Option(metavar="FILE", help="a JSON object a line: question_id, image, text")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the answers, a JSON object a line; what it holds already stays")],
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="the folder that the images lie in")] = None,
    template: TemplateName = None,
    max_new_tokens: MaxNewTokens = 1024,
    batch_size: BatchSize = 8,
    engine: EngineName = "transformers",
    precision: Precision = "auto",
    skip_bad: SkipBad = False,
    base: Base = None,
) -> None:
    """Answer a file of questions, greedily. Goes on where it stopped; torchrun splits the questions over processes."""
    from fastllava.console.ending import talk_to_whoever_listens
    from fastllava.errors import first_of_machine_speaks

    talk_to_whoever_listens()
    with first_of_machine_speaks():
        from fastllava.evaluate.answer import answer_file

        answer_file(
            checkpoint,
            questions,
            images,
            out,
            template=template,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            engine=engine,
            precision=precision,
            skip_bad=skip_bad,
            base=base,
            console=Console(),
        )


def score(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, ...")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="the benchmark's folder, laid out as in playground/data/eval")],
    answers: Annotated[Path, typer.Option(metavar="FILE", help="answers, one JSON object a line, from fastllava or from elsewhere")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write every figure and verdict there")] = None,
    upload: Annotated[Path | None, typer.Option(metavar="DIR", help="write what the benchmark's server takes there")] = None,
    replies: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="what a judge has said; several files, several runs")] = None,
    judge: Judge = None,
    base_url: BaseUrl = None,
    judge_runs: JudgeRuns = 1,
    rules: Rules = None,
) -> None:
    """Score stored answers to a benchmark by its official rules."""
    from fastllava.console.speaker import speaker
    from fastllava.disk import ready_to_write, write_json
    from fastllava.evaluate.benchmarks import benchmark as named
    from fastllava.evaluate.score import as_json, judge_for, notes, score_file, table, upload_files

    chosen, console = named(benchmark), Console()
    say = speaker(console)
    if json_file is not None:
        ready_to_write(json_file, "--json")
    asked = judge_for(chosen, replies or (), judge, base_url, answers.with_name(f"{answers.name}.judge"), judge_runs, say)
    for path in () if upload is None else upload_files(chosen, data, answers, upload):
        say(f"wrote {path}")
    found = score_file(chosen, data, answers, asked, rules)
    console.print(table(chosen, found))
    for line in notes(found):
        say(line)
    if json_file is not None:
        write_json(json_file, as_json(chosen, found))


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(metavar="DIR", help="laid out as the original's playground/data/eval")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for answers, uploads, scores.json and report.html")],
    benchmarks: Annotated[str | None, typer.Option(metavar="A,B", help="names, between commas; all twelve when left out")] = None,
    template: TemplateName = None,
    batch_size: BatchSize = 8,
    engine: EngineName = "transformers",
    precision: Precision = "auto",
    skip_bad: SkipBad = False,
    judge: Judge = None,
    base_url: BaseUrl = None,
    judge_runs: JudgeRuns = 1,
    rules: Rules = None,
    base: Base = None,
) -> None:
    """Answer and score the benchmarks that are there. Goes on where it stopped; torchrun splits the questions over processes."""
    from fastllava.console.ending import talk_to_whoever_listens
    from fastllava.console.speaker import speaker
    from fastllava.errors import first_of_machine_speaks
    from fastllava.evaluate.benchmarks import BENCHMARKS
    from fastllava.evaluate.benchmarks import benchmark as named
    from fastllava.evaluate.judge import make_judge

    talk_to_whoever_listens()
    console = Console()
    with first_of_machine_speaks():
        chosen = [named(name.strip()) for name in benchmarks.split(",")] if benchmarks is not None else list(BENCHMARKS.values())
        asked = None
        if judge is not None or base_url is not None:
            asked = make_judge((), judge, base_url, out / "judge.jsonl", judge_runs, speaker(console))
        from fastllava.evaluate.evaluation import evaluate_checkpoint

        outcomes = evaluate_checkpoint(
            checkpoint,
            data,
            chosen,
            out,
            template=template,
            batch_size=batch_size,
            engine=engine,
            precision=precision,
            skip_bad=skip_bad,
            judge=asked,
            rules=rules,
            base=base,
            console=console,
        )
        wrong = [one for one in outcomes if one.status == "failed" or (one.status == "missing" and benchmarks is not None)]
        if wrong or all(one.status == "missing" for one in outcomes):
            first = (wrong or outcomes)[0]
            raise UserError(f"{len(wrong or outcomes)} of {len(outcomes)} benchmarks could not be run; the first: {first.words}")


def chat(
    checkpoint: Checkpoint,
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="the picture to begin with, as /image FILE")] = None,
    template: TemplateName = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token; more: drawn, the more evenly")] = 0.0,
    precision: Precision = "auto",
    base: Base = None,
) -> None:
    """Talk about a picture. /help lists what else can be typed; lines can be piped in too."""
    from fastllava.console.ending import talk_to_whoever_listens

    talk_to_whoever_listens()
    from fastllava.evaluate.chat import chat as begin

    begin(
        checkpoint, image or [], template=template, max_new_tokens=max_new_tokens, temperature=temperature, precision=precision, base=base
    )


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output_dir of a run of either stage; it may still be going on")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the page to write; report.html in RUN when left out")] = None,
) -> None:
    """Write one page about a run: its course, data, answers and scores, and its config against the official recipe."""
    from fastllava.console.speaker import speaker
    from fastllava.evaluate.report.write import write_report

    speaker(Console())(f"report: {write_report(run, out)}")
