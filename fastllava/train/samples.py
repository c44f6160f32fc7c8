"""Questions that a model is asked while it trains, and its greedy answers: by its packed forward, sharded and compiled as it is.

There is no cache of keys and values: each token of an answer is a forward of all that comes before it, which is little for short answers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastllava.batch import IMAGE_ID, ImageSpec
from fastllava.config import Config, DataConfig
from fastllava.console.printable import quoted
from fastllava.console.speaker import Say
from fastllava.data.balance import balance
from fastllava.data.checks import BadRecord, Record, check_record
from fastllava.data.conversation import IMAGE, prompt
from fastllava.data.images import ImageError, examine, load_image, resolve_image
from fastllava.data.loader import Sample, pack
from fastllava.data.prepared import PreparedSet
from fastllava.data.questions import json_lines, listed_images, wrong_places
from fastllava.data.records import read_records
from fastllava.data.templates import Template, template
from fastllava.data.tokenizer import Tokenizer
from fastllava.distributed.processes import Processes
from fastllava.errors import UserError
from fastllava.model.llava import Llava
from fastllava.train.held_out import HeldOut, Lockstep

_DRAW = 2
"""Sets the draw of records apart from others with the same seed."""
_ENDS = {"v0": "###", "plain": "\n"}
"""The text that ends an answer, by style of the template, where no token does."""
_NOTHING_SUPERVISED = np.zeros((0, 2), np.int32)


@dataclass(frozen=True)
class Asked:
    """A question."""

    id: int | str
    question: str
    images: tuple[str, ...]
    """Paths below `data.images`, in the order of the marks in `ids`."""
    ids: list[int]
    """The prompt."""
    reference: str | None = None
    """The record's own answer."""

    def row(self, answer: str | None) -> dict[str, Any]:
        """Question and answer as metrics.jsonl has them."""
        image = list(self.images) if len(self.images) > 1 else next(iter(self.images), None)
        row = {"id": self.id, "image": image, "question": self.question, "answer": answer, "reference": self.reference}
        return {key: value for key, value in row.items() if value is not None or key == "answer"}


def find_asked(config: Config, tokenizer: Tokenizer, spec: ImageSpec, prepared: PreparedSet, held: HeldOut | None) -> list[Asked]:
    """The questions of `eval.samples`: of a file, or the first ones of records, of the held-out set where there is one.

    Raises UserError that names the question which cannot be asked.
    """
    wanted = config.eval.samples
    if wanted is None:
        return []
    form = template(config.data.template)
    if isinstance(wanted, Path):
        return _of_file(wanted, config, form, tokenizer, spec)
    source, samples = (prepared, np.arange(len(prepared))) if held is None else (held.prepared, held.samples)
    path = config.data.records if held is None or held.of_records else config.eval.held_out
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([config.train.seed, len(samples), _DRAW]).generate_state(1)[0]))
    drawn = samples[np.sort(torch.randperm(len(samples), generator=generator)[:wanted].numpy())]
    records = _records(Path(str(path)), source.places(drawn.tolist()), config.data.max_images)
    asked = [one for record in records if (one := _of_record(record, form, tokenizer)) is not None]
    return [one for one in asked if _rows(one.ids, spec) < config.data.max_tokens]


def _rows(ids: Sequence[int], spec: ImageSpec) -> int:
    """Rows of a prompt once its images have become patches."""
    return len(ids) + ids.count(IMAGE_ID) * (spec.patches - 1)


def _records(path: Path, places: Sequence[int], max_images: int) -> list[Record]:
    """The records with these numbers in the file, in this order."""
    wanted, found = set(places), {}
    for raw in read_records(path):
        if raw.index in wanted:
            with suppress(BadRecord):
                found[raw.index] = check_record(raw.value, raw.index, max_images)
            if raw.index == max(wanted):
                break
    return [found[place] for place in places if place in found]


def _of_record(record: Record, form: Template, tokenizer: Tokenizer) -> Asked | None:
    """Ask the first question of a record; None where it has none. Of several images those that it shows are asked about."""
    human = next((number for number, (role, _) in enumerate(record.turns) if role == "human"), None)
    if human is None:
        return None
    question, answers = record.turns[human][1], [text for role, text in record.turns[human + 1 :] if role == "gpt"]
    placed = len(record.images) > 1
    images = record.images[: question.count(IMAGE)] if placed else record.images
    shown = question.replace(IMAGE, "").strip() if images and not placed else question
    return Asked(record.id, shown, images, prompt(form, question, len(images), tokenizer, placed), answers[0] if answers else None)


def _of_file(path: Path, config: Config, form: Template, tokenizer: Tokenizer, spec: ImageSpec) -> list[Asked]:
    try:
        rows = list(json_lines(path))
    except UserError as error:
        raise UserError(f"eval.samples: {error}") from None
    if not rows:
        raise UserError(f"eval.samples: {path} holds no question; write one JSON object with question_id and text a line")
    return [_of_line(row, f"eval.samples: line {number} of {path}", config, form, tokenizer, spec) for number, row in rows]


def _of_line(row: Mapping[str, Any], where: str, config: Config, form: Template, tokenizer: Tokenizer, spec: ImageSpec) -> Asked:
    name, text, images = row.get("question_id"), row.get("text"), listed_images(row.get("image"))
    if isinstance(name, bool) or not isinstance(name, int | str) or not isinstance(text, str) or images is None:
        raise UserError(
            f"{where} is no question; write question_id, text and, where there is one, the path of its image, or a list of them"
        )
    if len(images) > config.data.max_images:
        most = config.data.max_images
        raise UserError(
            f"{where} has {len(images)} images, and data.max_images is {most}; write data.max_images={len(images)}, or fewer images"
        )
    for image in images:
        if config.data.images is None:
            raise UserError(f"{where} has the image {image}; write data.images, the folder that it lies in")
        try:
            examine(resolve_image(config.data.images.resolve(), image, config.data.follow_links), config.data)
        except BadRecord as problem:
            named = "" if len(images) == 1 else f" {quoted(image)}"
            raise UserError(f"{where}: its image{named} {problem.detail}") from None
    if form.style == "plain" and not images:
        raise UserError(f"{where} has no image, and template {form.name} asks with an image alone; give it one, or take the line out")
    if (wrong := wrong_places(text, len(images))) is not None:
        raise UserError(f"{where}: {wrong}")
    ids = prompt(form, text, len(images), tokenizer, placed=len(images) > 1 and IMAGE in text)
    if _rows(ids, spec) >= config.data.max_tokens:
        raise UserError(f"{where} leaves no room for an answer in data.max_tokens={config.data.max_tokens}; shorten it")
    return Asked(name, text, images, ids)


@dataclass(frozen=True)
class Prompt:
    """What an answer goes on from."""

    ids: Sequence[int]
    images: Sequence[NDArray[np.uint8]]
    """uint8 [3, size, size] for each mark of an image in `ids`."""


@torch.no_grad()
def greedy(
    model: Llava,
    prompts: Sequence[Prompt],
    ended: Callable[[Sequence[int]], bool],
    max_new_tokens: int,
    max_tokens: int,
    goes_on: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """The ids that each prompt goes on with: the most likely one at each step, until `ended` says so of them or there is no room.

    All prompts are packed into one batch. `goes_on` is told whether a prompt here is still open, and says whether there is another
    forward: in several processes as long as one is open in any.
    """
    device = next(model.parameters()).device
    new: list[list[int]] = [[] for _ in prompts]
    open_ = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not goes_on(bool(open_)):
            break
        samples = [Sample(np.array([*prompts[i].ids, *new[i]], np.int32), _NOTHING_SUPERVISED, prompts[i].images, 0.0) for i in open_]
        batch = pack(samples, model.spec, max_tokens).to(device)
        tokens = model.logits(batch, batch.cu_seqlens[1:].long() - 1).argmax(-1).tolist()
        for i, token in zip(open_, tokens[: len(open_)], strict=True):
            new[i].append(token)
        open_ = [i for i in open_ if not ended(new[i]) and _length(prompts[i], new[i], model.spec) < max_tokens]
    return new


def _length(of: Prompt, new: Sequence[int], spec: ImageSpec) -> int:
    return _rows(of.ids, spec) + len(new)


class Answers:
    """How answers end and read, by tokenizer and template."""

    def __init__(self, tokenizer: Tokenizer, form: Template) -> None:
        self._tokenizer, self._text = tokenizer, _ENDS.get(form.style)
        last = tokenizer.control(form.marks[-1]) if form.marks else None
        self._ids = {tokenizer.eos_id, last} - {None}

    def ended(self, new: Sequence[int]) -> bool:
        """Whether an answer of these ids is at its end."""
        return new[-1] in self._ids or (self._text is not None and self._text in self._tokenizer.decode(new).lstrip())

    def text(self, new: Sequence[int]) -> str:
        """The answer, without what ends it."""
        kept = new[:-1] if new and new[-1] in self._ids else new
        said = self._tokenizer.decode(kept).strip()
        return said if self._text is None else said.partition(self._text)[0].strip()


class SampleAnswers:
    """Asks a model the questions of a run, as often as it is told to."""

    def __init__(
        self, asked: Sequence[Asked], config: Config, tokenizer: Tokenizer, spec: ImageSpec, group: Processes, report: Say
    ) -> None:
        """`report` speaks on this process."""
        self._asked, self._config, self._spec, self._group, self._report = asked, config, spec, group, report
        self._answers = Answers(tokenizer, template(config.data.template))
        longest = config.eval.max_new_tokens
        rows = [min(_rows(a.ids, spec) + longest, config.data.max_tokens) for a in asked]
        self._parts = balance(np.array(rows, np.int32), np.array(rows, np.int64), config.train.micro_batch_tokens, group.world)

    def rows(self, model: Llava, lockstep: Lockstep) -> list[dict[str, Any]]:
        """A row for each question, in their order, on all processes together; the answer is None where its image cannot be read."""
        found: dict[int, str | None] = {}
        for ranks in self._parts:
            mine = ranks[self._group.rank].tolist()
            lockstep.fetching()
            with self._group.together():
                prompts = {i: p for i in mine if (p := self._prompt(self._asked[i])) is not None}
            limits = self._config.eval.max_new_tokens, self._config.data.max_tokens
            with lockstep.computing():
                new = greedy(model, list(prompts.values()), self._answers.ended, *limits, lambda mine: lockstep.agree(mine=mine))
            found |= dict.fromkeys(mine) | {i: self._answers.text(ids) for i, ids in zip(prompts, new, strict=True)}
        together = {i: answer for part in self._group.gather(found) for i, answer in part.items()}
        return [one.row(together[i]) for i, one in enumerate(self._asked)]

    def _prompt(self, one: Asked) -> Prompt | None:
        data: DataConfig = self._config.data
        if data.images is None:
            return Prompt(one.ids, ())
        pixels = []
        for image in one.images:
            try:
                path = resolve_image(data.images.resolve(), image, data.follow_links)
                pixels.append(load_image(path, data.image_policy, self._spec, data))
            except (BadRecord, ImageError) as problem:
                self._report(f"question {one.id} is not asked, as its image {image} {problem.detail}")
                return None
        return Prompt(one.ids, pixels)
