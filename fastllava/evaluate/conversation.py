"""A conversation about pictures, answered token by token: what was said, the prompt that it makes, and the text as it comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastllava.batch import IMAGE_ID
from fastllava.console.printable import printable
from fastllava.data.asking import Turn, ask, prompt_text
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import Trained
from fastllava.evaluate.engines import Prompt
from fastllava.evaluate.engines.transformers_engine import TransformersEngine
from fastllava.evaluate.pictures import BadQuestion, load_picture
from fastllava.evaluate.questions import Question

TOP_K = 50
"""With a temperature the next token is drawn from so many, as in the original's llava/serve/cli.py by transformers' default."""

FOR_THE_ANSWER = 4
"""The share of the context, one in so many, that is kept free for an answer; less where the limit of new tokens is less."""

Write = Callable[[str], object]


@dataclass
class Conversation:
    """What was said so far, and the model that answers."""

    trained: Trained
    engine: TransformersEngine
    max_new_tokens: int
    temperature: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    """The pictures in the order in which they were shown. Each turn but the first says how many of them are its own."""
    waiting: int = 0
    """Pictures that stand before the next question, unless it is the first, before which stand all that no other turn has."""
    asked: tuple[str, list[int]] | None = None
    """The prompt of the last answer: its text and its ids."""

    @property
    def context(self) -> int:
        """Tokens that the model was trained to see at once, those of the picture included."""
        positions = self.trained.model.origin.text.get("max_position_embeddings")
        return min(self.trained.max_tokens, positions) if isinstance(positions, int) else self.trained.max_tokens

    def show(self, path: Path | None) -> None:
        """Begin anew, about the picture at `path` or about none. Raises UserError, and leaves everything as it was."""
        self.pixels = [] if path is None else [self._loaded(path)]
        self.reset()

    def add(self, path: Path) -> None:
        """Show one more picture, before the next question. Raises UserError, and leaves everything as it was."""
        patches, pictures = self.trained.model.spec.patches, len(self.pixels) + 1
        if pictures > 1 and pictures * patches >= self._most():
            room = f"{pictures} pictures take {pictures * patches:,} tokens, and the model takes {self.context:,}"
            raise UserError(f"{room}, some of them for a question and its answer; begin anew with fewer, by /image")
        self.pixels.append(self._loaded(path))
        self.waiting += 1

    def reset(self) -> None:
        """Begin anew, about the same pictures."""
        self.turns, self.waiting = [], 0

    def _loaded(self, path: Path) -> NDArray[np.uint8]:
        if not path.is_file():
            raise UserError(f"there is no file '{path}'; give the path of a picture")
        try:
            return load_picture(Question("", "", path, ""), path, self.trained)
        except BadQuestion as problem:
            raise UserError(problem.reason) from None

    def _most(self) -> int:
        """Tokens of a prompt that leaves its answer its place in the context."""
        return self.context - min(self.max_new_tokens, self.context // FOR_THE_ANSWER)

    def fit(self, question: str) -> int:
        """Forget the oldest rounds until the next answer has its place in the context; how many.

        Raises UserError for too long a question.
        """
        most = self._most()
        dropped = 0
        while (tokens := self.tokens(self.prompt(self.turns[dropped:], question)[1])) > most and dropped < len(self.turns):
            dropped += 1
        if tokens > self.context:
            raise UserError(f"the question makes a prompt of {tokens:,} tokens, and the model takes {self.context:,}; ask a shorter one")
        del self.turns[:dropped]
        return dropped

    def tokens(self, ids: Sequence[int]) -> int:
        """The tokens of a prompt once its pictures have become patches."""
        return len(ids) + ids.count(IMAGE_ID) * (self.trained.model.spec.patches - 1)

    def prompt(self, turns: Sequence[Turn], question: str) -> tuple[str, list[int]]:
        """Text and ids of the prompt; each picture stands before its question, those of rounds that were forgotten before the first."""
        first, *later = [*turns, Turn(question, self.waiting)]
        said = [replace(first, images=len(self.pixels) - sum(turn.images for turn in later)), *later]
        return prompt_text(self.trained.form, said), ask(self.trained.form, said, self.trained.tokenizer)

    def answer(self, question: str, write: Write) -> None:
        """Answer, and pass the text on to `write` as it comes. What there is of an answer that was interrupted counts as one."""
        self.asked = self.prompt(self.turns, question)
        text = Text(self.trained.tokenizer, self.trained.stops, write)
        try:
            self._generate(Prompt(self.asked[1], self.pixels), text, self.max_new_tokens)
        except KeyboardInterrupt:
            if said := text.end():
                self._said(question, said)
            raise
        self._said(question, text.end())

    def _said(self, question: str, answer: str) -> None:
        self.turns.append(Turn(question, self.waiting, answer))
        self.waiting = 0

    def warm_up(self) -> None:
        """Answer nothing with one token, so that what a first answer imports is there: a Ctrl-C while it is imported ends the program."""
        self._generate(Prompt([self.trained.tokenizer.bos_id or 0]), Text(self.trained.tokenizer, (), lambda _: None), 1)

    @torch.no_grad()
    def _generate(self, prompt: Prompt, text: "Text", max_new_tokens: int) -> None:
        embeds_BLD, mask_BL = self.engine.inputs([prompt])
        settings = self.engine.settings(max_new_tokens)
        if self.temperature:
            settings["generation_config"].update(do_sample=True, temperature=self.temperature, top_k=TOP_K)
        self.engine.decoder.generate(inputs_embeds=embeds_BLD, attention_mask=mask_BL, streamer=text, **settings)


class Text:
    """The text of tokens as they come, in the form of transformers' streamers: characters and blanks wait until they are whole."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[int], write: Write) -> None:
        self._tokenizer, self._stops, self._write = tokenizer, stops, write
        self._tokens: list[int] = []
        self._written = 0
        self._begun = False

    def put(self, tokens: torch.Tensor) -> None:
        """Take the tokens of a step. The first ones are the prompt's, of which there are none beside the embeddings."""
        if not self._begun:
            self._begun = True
            return
        self._tokens += [token for token in tokens.flatten().tolist() if token not in self._stops]
        # Of a character that is not whole the decoder makes U+FFFD.
        self._show(self._text().rstrip("\ufffd").rstrip())

    def end(self) -> str:
        """Write what has waited; the whole answer."""
        text = self._text()
        self._show(text)
        return text

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens).strip()

    def _show(self, text: str) -> None:
        if new := text[self._written :]:
            # First, so that what an interruption cuts off is not written twice.
            self._written = len(text)
            self._write(printable(new))
