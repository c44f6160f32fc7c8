"""Pieces of a run's folder made by hand, with records and answers of people who mean no good."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllava.batch import ImageSpec

ATTACK = "</script><script>document.title = 'taken'; fetch('http://127.0.0.1:9/')</script><img src=x onerror=\"document.title='taken'\">"
NASTY = f"{ATTACK} \u202egnp.exe\u202c \x1b[31m \x00 {{{{ 7 * 7 }}}} &amp; <b>"
SPEC = ImageSpec(56, 16, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def talk(name: str, question: str, answer: str, image: str | None = None) -> dict[str, Any]:
    turns = [{"from": "human", "value": ("<image>\n" if image else "") + question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


def step_row(step: int, **more: Any) -> dict[str, Any]:
    figures = {"samples": 4, "tokens": 400, "supervised_tokens": 40, "step_seconds": 0.5, "data_wait_seconds": 0.01 * (1 + step % 3)}
    rates = {
        "samples_per_second": 8.0 + step % 7,
        "tokens_per_second": 800.0 + 100 * (step % 7),
        "grad_norm": 2.0 / (1 + step),
        "lr": 1e-5 * step,
    }
    return {"step": step, "loss": 3 * math.exp(-step / 20) + 0.1, **figures, **rates, **more}


def eval_row(step: int, loss: float | None, answer: str = "a dog") -> dict[str, Any]:
    asked = {"id": "q1", "image": "good.png", "question": f"What is it? {NASTY}", "answer": answer, "reference": "a dog"}
    return {"step": step, "held_out_loss": loss, "held_out_samples": 3, "samples": [asked], "eval_seconds": 1.0}


@dataclass(frozen=True)
class Made:
    """A folder of a run and what lies in it."""

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    def write(self, name: str, value: Any) -> "Made":
        """Write a file of the folder: lines of JSON, JSON, or bytes."""
        path = self.folder / name
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif isinstance(value, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in value))
        else:
            path.write_text(json.dumps(value))
        return self
