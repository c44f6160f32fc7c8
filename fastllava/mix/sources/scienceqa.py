"""ScienceQA: questions with choices, some with a picture, as the original's converter writes them (convert_sqa_to_llava.py)."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from fastllava.mix import fields
from fastllava.mix.conversation import IMAGE, BadRow, Conversation, Pair
from fastllava.mix.keys import FilePath, Section, SourceKeys
from fastllava.mix.rows import Row
from fastllava.mix.rules import letter
from fastllava.mix.run import Run

_INPUTS = "CQM|QCM|QCML|QCME|QCMLE|QCLM|QCEM|QCLEM"
_OUTPUTS = "A|AL|AE|ALE|AEL|LA|EA|LEA|ELA|LEPA"


class Files(Section):
    """The two files."""

    problems: FilePath = Field(description="problems.json")
    splits: FilePath = Field(description="pid_splits.json")


class Rules(Section):
    """How they become conversations."""

    split: str = Field(default="train", description="a split of pid_splits.json, such as train, trainval or minitrain")
    prompt_format: str = Field(
        default="QCM-LEA",
        pattern=f"^({_INPUTS})-({_OUTPUTS})$",
        description="what is asked and what is answered: Question, Context, Multiple choices, Lecture, Explanation, Answer, in this order",
    )


class Keys(SourceKeys):
    """ScienceQA."""

    format: Literal["scienceqa"]
    files: Files
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """One conversation a problem, in the order of the split."""
    problems = run.lookup()

    def keep(row: Row) -> None:
        problems.put(str(row.key), dict(fields.an_object(row.value)))

    def asked(row: Row) -> Conversation:
        name = str(fields.name({"id": row.value}, "id"))
        problem = problems.take(name)
        if problem is None:
            raise BadRow("answer_missing", f"problem {name} is not in {keys.files.problems}")
        return conversation_of(name, problem, keys.rules.prompt_format)

    for _ in run.json(keys.files.problems, keep):
        pass
    yield from run.json(keys.files.splits, asked, keys.rules.split)
    run.dropped.by_rule("other_split", sum(1 for _ in problems.left()))


def conversation_of(name: str, problem: Mapping[str, Any], prompt_format: str) -> Conversation:
    """The problem `name` asked and answered in `prompt_format`. Raises BadRow."""
    choices, correct = fields.texts(problem, "choices"), fields.whole(problem, "answer")
    if not 0 < len(choices) <= 26 or correct >= len(choices):
        raise BadRow("field", f"the answer is choice {correct} of {len(choices)}; the first is 0")
    parts = {
        "question": fields.text(problem, "question"),
        "context": fields.text(problem, "hint").strip() or "N/A",
        "options": " ".join(f"({letter(number)}) {choice}" for number, choice in enumerate(choices)),
        "lecture": fields.text(problem, "lecture"),
        "solution": fields.text(problem, "solution"),
        "answer": letter(correct),
    }
    wanted, given = prompt_format.split("-")
    question = _as_written(_question(wanted, parts), "Question: ")
    answer = _as_written(_answer(given, parts), "Answer: ")
    image = problem.get("image")
    if image is None:
        return Conversation(name, None, [Pair(question, answer)])
    return Conversation(name, f"{name}/{fields.a_text(image, 'image')}", [Pair(f"{question}\n{IMAGE}", answer)], placed=True)


def _question(wanted: str, parts: Mapping[str, str]) -> str:
    """What is asked, each part on a line of its own."""
    asked, context, options = f"Question: {parts['question']}", f"Context: {parts['context']}", f"Options: {parts['options']}"
    told = {"L": parts["lecture"], "E": parts["solution"]}
    because = " ".join(["BECAUSE:", *(told[key] for key in wanted if key in told)])
    match wanted:
        case "CQM":
            lines = [context, asked, options]
        case "QCM":
            lines = [asked, context, options]
        case _:
            lines = [asked, context, options, because] if wanted.startswith("QCM") else [asked, context, because, options]
    return "\n".join(lines)


def _answer(given: str, parts: Mapping[str, str]) -> str:
    """What is answered."""
    lecture, solution = parts["lecture"], parts["solution"]
    says = f"The answer is {parts['answer']}."
    match given:
        case "A":
            return f"Answer: {says}"
        # The original swaps what these two give as the reason.
        case "AL":
            return f"Answer: {says} BECAUSE: {solution}"
        case "AE":
            return f"Answer: {says} BECAUSE: {lecture}"
        case "LEPA":
            told = f"LECTURE: {lecture}\n" * bool(lecture.strip()) + f"SOLUTION: {solution}\n" * bool(solution.strip())
            return f"{told}###\nANSWER: {parts['answer']}."
    told = " ".join({"L": lecture, "E": solution}[key] for key in given if key != "A")
    return f"Answer: {says} BECAUSE: {told}" if given.startswith("A") else f"Answer: {told} {says}"


def _as_written(text: str, mark: str) -> str:
    """The text as the original squeezes it: pairs of spaces to one, no reason without words, and no `mark` where it begins with one."""
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace(mark, "") if text.startswith(mark) else text
