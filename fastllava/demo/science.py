"""The demo's own small benchmark: a question with options about each held-out picture, in the files of ScienceQA."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from fastllava.demo.dataset import DrawnSet
from fastllava.demo.questions import CHOICES, ask
from fastllava.evaluate.benchmark import OPTION_LETTER


def write_science(folder: Path, drawn: DrawnSet, seed: int) -> None:
    """Write problems.json, pid_splits.json, llava_test_CQM-A.json and images/test/<number>/image.png, as `fastllava eval` reads them.

    The question types take turns from picture to picture. The same set and seed write the same files.
    """
    rng, problems, asked = random.Random(seed), {}, []
    for number, (name, scene) in enumerate(drawn.held_out_scenes.items(), 1):
        kinds = [kind for kind in CHOICES if ask(kind, scene, rng) is not None]
        question = ask(kinds[number % len(kinds)], scene, rng)
        assert question is not None  # noqa: S101 (the types that the scene allows)
        problems[str(number)] = _problem(question.kind, question.text, question.answer)
        text = question.with_options().text.removesuffix(OPTION_LETTER)
        turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": question.with_options().answer}]
        asked.append({"id": str(number), "image": f"{number}/image.png", "conversations": turns})
        place = folder / "images" / "test" / str(number)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(drawn.images / name, place / "image.png")
    _write(folder / "problems.json", problems)
    _write(folder / "pid_splits.json", {"test": list(problems)})
    _write(folder / "llava_test_CQM-A.json", asked)


def _problem(kind: str, text: str, answer: str) -> dict[str, Any]:
    options = list(CHOICES[kind])
    about = {"task": "closed choice", "grade": "", "subject": "drawn pictures", "topic": kind, "category": kind, "skill": kind}
    told = {"hint": "", "image": "image.png", "lecture": "", "solution": "", "split": "test"}
    return {"question": text, "choices": options, "answer": options.index(answer), **about, **told}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
