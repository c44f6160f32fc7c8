"""What turns prompts into answers: one module an engine, named as the word of `--engine`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastllava.batch import IMAGE_ID
from fastllava.distributed.processes import ALONE, Processes
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import Trained, load_trained

ENGINES = ("transformers", "vllm")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model is asked."""

    ids: list[int]
    """Token ids; IMAGE_ID where a picture stands."""
    pixels: Sequence[NDArray[np.uint8]] = ()
    """uint8 [3, size, size] for each IMAGE_ID. Prompts about one picture may share the array, and its features are then computed once."""


class Engine(Protocol):
    """A way to answer greedily."""

    name: str
    window: int
    """So many prompts at a time keep it busy."""

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """For each prompt its index and the tokens of its answer, as they come; the token that ended it is the last of them.

        An answer ends with one of `Trained.stops` or after `max_new_tokens`. Raises UserError.
        """
        ...


def make_engine(
    name: str, trained: Trained, batch_size: int, report: Callable[[str], object] = lambda line: None, pictures: int = 1
) -> Engine:
    """The engine called `name` over the model `trained`. `batch_size`: prompts at a time, where the engine does not choose itself.

    `pictures`: the most that a prompt shows. Raises UserError when there is none of that name, or it is not installed.
    """
    if name not in ENGINES:
        raise UserError(f"--engine: no engine '{name}'; write one of {', '.join(ENGINES)}")
    if name == "vllm":
        from fastllava.evaluate.engines.vllm_engine import VllmEngine

        return VllmEngine(trained, report, pictures)
    from fastllava.evaluate.engines.transformers_engine import TransformersEngine

    return TransformersEngine(trained, batch_size, report)


def load_engine(
    checkpoint: Path,
    name: str,
    template: str | None,
    batch_size: int,
    precision: str,
    report: Callable[[str], object],
    group: Processes = ALONE,
    pictures: int = 1,
    base: Path | None = None,
) -> tuple[Trained, Engine]:
    """The model of `checkpoint`, asked with the template of that name where one is given, and the engine called `name` over it.

    `pictures`: the most that a prompt shows; `base`: `load_trained`'s. Every process of `group` calls this. Raises UserError.
    """
    with group.first_speaks():
        # vLLM fills the GPUs by itself.
        device = torch.device("cpu") if name == "vllm" else None
        trained = load_trained(checkpoint, report, precision=precision, device=device, group=group, base=base)
        trained = trained if template is None else trained.with_template(template)
        return trained, make_engine(name, trained, batch_size, report, pictures)


def rows_of(prompt: Prompt, trained: Trained) -> int:
    """Rows of the prompt once its pictures have become patches, and a prompt with a picture has been cut at `trained.max_tokens`.

    The original cuts after the splice, from the end, and does not cut a prompt of text alone (llava/model/llava_arch.py).
    """
    rows = whole_rows(prompt.ids, trained)
    return min(rows, trained.max_tokens) if IMAGE_ID in prompt.ids else rows


def whole_rows(ids: Sequence[int], trained: Trained) -> int:
    """Rows of a prompt once its pictures have become patches, uncut."""
    return len(ids) + ids.count(IMAGE_ID) * (trained.model.spec.patches - 1)
