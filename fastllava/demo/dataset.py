"""The drawn set on disk: pictures, captions for stage 1, conversations for stage 2, held-out questions, all as LLaVA JSON."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllava.demo.questions import KINDS, Question, ask, ask_several, caption, text_question
from fastllava.demo.scenes import Scene, draw_scene, paint


@dataclass(frozen=True)
class HeldOut:
    """One held-out question."""

    image: str
    """File below the image folder."""
    question: Question


@dataclass(frozen=True)
class DrawnSet:
    """What was drawn and where it lies."""

    images: Path
    pretrain: Path
    """A caption a picture."""
    finetune: Path
    """A conversation a picture, and some without."""
    train: dict[str, Scene]
    """The scene of each training picture, by file below `images`."""
    held_out_scenes: dict[str, Scene]
    """The scene of each held-out picture."""
    held_out: list[HeldOut]
    """Every question type once a held-out picture, where its scene allows one."""
    questions: Path
    """The same as a questions file for `fastllava answer`."""
    texts: list[str]
    """Every sentence of the training set, questions and answers in the form of a conversation without a picture."""


def draw_set(folder: Path, n_train: int, n_held_out: int, questions: int, seed: int) -> DrawnSet:
    """Draw `n_train` and `n_held_out` pictures into `folder`, and write their records there. The same seed draws the same set.

    `questions`: at most so many a training picture.
    """
    rng = random.Random(seed)
    train = {f"train_{index:05}.png": draw_scene(rng, held_out=False) for index in range(n_train)}
    held_out_scenes = _different_scenes(n_held_out, rng)
    if shared := set(train.values()) & set(held_out_scenes.values()):
        raise AssertionError(f"{len(shared)} held-out scenes occur in training, such as {shared.pop()}")

    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, scene in (train | held_out_scenes).items():
        paint(scene, rng).save(images / name, compress_level=1)

    captions = {name: caption(scene, rng) for name, scene in train.items()}
    conversations = {name: ask_several(scene, questions, rng) for name, scene in train.items()}
    # A twentieth of the conversations is without a picture, as a twentieth of the original's mix is.
    text_only = [[text_question(rng) for _ in range(2)] for _ in range(n_train // 19)]
    held_out = [HeldOut(name, asked) for name, scene in held_out_scenes.items() for kind in KINDS if (asked := ask(kind, scene, rng))]

    records = [_record(name, name, asked) for name, asked in conversations.items()]
    records += [_record(f"text_{index:05}", None, asked) for index, asked in enumerate(text_only)]
    pretrain, finetune = folder / "pretrain.json", folder / "finetune.json"
    _write(pretrain, [_record(name, name, [Question("caption", "Describe the picture.", text)]) for name, text in captions.items()])
    _write(finetune, records)
    _write(
        folder / "held_out.json",
        [
            {**_record(f"held_out_{index:05}", asked.image, [asked.question]), "type": asked.question.kind}
            for index, asked in enumerate(held_out)
        ],
    )
    questions_file = folder / "questions.jsonl"
    rows = ({"question_id": index, "image": one.image, "text": one.question.text} for index, one in enumerate(held_out))
    questions_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked_all = [question for asked in (*conversations.values(), *text_only) for question in asked]
    texts = [*captions.values(), *(f"USER: {question.text} ASSISTANT: {question.answer}" for question in asked_all)]
    return DrawnSet(images, pretrain, finetune, train, held_out_scenes, held_out, questions_file, texts)


def _different_scenes(number: int, rng: random.Random) -> dict[str, Scene]:
    scenes: dict[Scene, None] = {}
    while len(scenes) < number:
        scenes.setdefault(draw_scene(rng, held_out=True))
    return {f"held_out_{index:05}.png": scene for index, scene in enumerate(scenes)}


def _record(name: str, image: str | None, asked: list[Question]) -> dict[str, Any]:
    turns = []
    for index, question in enumerate(asked):
        mark = "<image>\n" if image is not None and index == 0 else ""
        turns += [{"from": "human", "value": mark + question.text}, {"from": "gpt", "value": question.answer}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
