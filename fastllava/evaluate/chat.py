"""A conversation about a picture in the terminal: answers appear as they are made, and the exact prompt is shown on request."""

import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from fastllava.batch import IMAGE_ID
from fastllava.console.printable import printable, quoted
from fastllava.console.speaker import speaker
from fastllava.console.stopping import every_interrupt_is_the_first
from fastllava.data.asking import Turn, ask, prompt_text
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import Trained, load_trained
from fastllava.evaluate.engines import Prompt
from fastllava.evaluate.engines.transformers_engine import TransformersEngine
from fastllava.evaluate.pictures import BadQuestion, load_picture
from fastllava.evaluate.questions import Question

HELP = """\
/image FILE  ask about this picture, in a new conversation; without FILE about none
/reset       begin the conversation anew, about the same picture
/prompt      show the prompt of the last answer, word for word
/help        show these lines
/quit        end, as Ctrl-D does; Ctrl-C stops an answer
A question that begins with / is written with two: //"""

ONE_PICTURE = "LLaVA-1.5 was trained with one picture a conversation"
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
    pixels: NDArray[np.uint8] | None = None
    asked: tuple[str, list[int]] | None = None
    """The prompt of the last answer: its text and its ids."""

    @property
    def context(self) -> int:
        """Tokens that the model was trained to see at once, those of the picture included."""
        positions = self.trained.model.origin.text.get("max_position_embeddings")
        return min(self.trained.max_tokens, positions) if isinstance(positions, int) else self.trained.max_tokens

    def show(self, path: Path | None) -> None:
        """Begin anew, about the picture at `path` or about none. Raises UserError, and leaves everything as it was."""
        if path is not None and not path.is_file():
            raise UserError(f"/image: there is no file {quoted(str(path))}; the conversation is as it was")
        try:
            self.pixels = load_picture(Question("", "", path, ""), self.trained)
        except BadQuestion as problem:
            raise UserError(f"/image: {problem.reason}; the conversation is as it was") from None
        self.turns = []

    def reset(self) -> None:
        """Begin anew, about the same picture."""
        self.turns = []

    def fit(self, question: str) -> int:
        """Forget the oldest rounds until the next answer has its place in the context; how many.

        Raises UserError for too long a question.
        """
        most = self.context - min(self.max_new_tokens, self.context // FOR_THE_ANSWER)
        dropped = 0
        while (tokens := self.tokens(self.prompt(self.turns[dropped:], question)[1])) > most and dropped < len(self.turns):
            dropped += 1
        if tokens > self.context:
            raise UserError(f"the question makes a prompt of {tokens:,} tokens, and the model takes {self.context:,}; ask a shorter one")
        del self.turns[:dropped]
        return dropped

    def tokens(self, ids: Sequence[int]) -> int:
        """The tokens of a prompt once its picture has become patches."""
        return len(ids) + ids.count(IMAGE_ID) * (self.trained.model.spec.patches - 1)

    def prompt(self, turns: Sequence[Turn], question: str) -> tuple[str, list[int]]:
        """Text and ids of the prompt; the picture stands before the first of the questions."""
        said = [*turns, Turn(question)]
        if self.pixels is not None:
            said[0] = replace(said[0], images=1)
        return prompt_text(self.trained.form, said), ask(self.trained.form, said, self.trained.tokenizer)

    def answer(self, question: str, write: Write) -> None:
        """Answer, and pass the text on to `write` as it comes. What there is of an answer that was interrupted counts as one."""
        self.asked = self.prompt(self.turns, question)
        text = Text(self.trained.tokenizer, self.trained.stops, write)
        try:
            self._generate(Prompt(self.asked[1], self.pixels), text, self.max_new_tokens)
        except KeyboardInterrupt:
            if said := text.end():
                self.turns.append(Turn(question, 0, said))
            raise
        self.turns.append(Turn(question, 0, text.end()))

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


@dataclass(frozen=True)
class Terminal:
    """Where the questions come from, and where answers and remarks go."""

    write: Write
    """For answers."""
    say: Callable[[str], object]
    """For remarks, a line each."""
    interactive: bool
    """Whether a person sits there, who is asked and may press Ctrl-C."""

    def lines(self) -> Iterator[str]:
        """The lines that are typed or piped in, until their end."""
        while True:
            try:
                line = input("> ") if self.interactive else sys.stdin.readline()
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.write("\n")
                self.say("Ctrl-D or /quit ends")
                continue
            if not self.interactive and not line:
                return
            yield line.removesuffix("\n").removesuffix("\r")


def talk(conversation: Conversation, terminal: Terminal) -> None:
    """Answer line by line until the end of the lines, or /quit."""
    for line in terminal.lines():
        command, _, rest = line.strip().partition(" ")
        if not command:
            continue
        if command == "/quit":
            return
        try:
            if command.startswith("/") and not command.startswith("//"):
                _obey(command, rest.strip(), conversation, terminal)
            else:
                _answer(line.removeprefix("/") if command.startswith("//") else line, conversation, terminal)
        except UserError as error:
            terminal.say(str(error))


def _obey(command: str, rest: str, conversation: Conversation, terminal: Terminal) -> None:
    match command:
        case "/image":
            anew = conversation.pixels is not None or bool(conversation.turns)
            conversation.show(Path(rest).expanduser() if rest else None)
            shown = f"the picture is {rest}" if rest else "there is no picture now"
            terminal.say(f"{shown}, and the conversation begins anew: {ONE_PICTURE}" if anew else shown)
        case "/reset":
            conversation.reset()
            terminal.say("the conversation begins anew" + ("" if conversation.pixels is None else ", about the same picture"))
        case "/prompt":
            if conversation.asked is None:
                raise UserError("/prompt: nothing was asked yet")
            text, ids = conversation.asked
            patches = conversation.tokens(ids) - len(ids) + 1
            picture = f", one of them for the picture, which takes the place of {patches}" if IMAGE_ID in ids else ""
            terminal.write(f"{printable(text)}\n")
            terminal.say(f"{len(ids)} ids{picture}")
        case "/help":
            terminal.write(f"{HELP}\n")
        case _:
            raise UserError(f"{quoted(command, 40)} is no command; write /help for those there are, or // before a question")


def _answer(question: str, conversation: Conversation, terminal: Terminal) -> None:
    if dropped := conversation.fit(question):
        rounds = "the oldest round is" if dropped == 1 else f"the oldest {dropped} rounds are"
        terminal.say(f"the conversation has outgrown the model's {conversation.context} tokens: {rounds} forgotten")
    try:
        conversation.answer(question, terminal.write)
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
        terminal.write("\n")
        terminal.say("stopped")
        return
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        terminal.write("\n")
        raise UserError("the GPU's memory is full; write /reset, or begin with --precision bf16 or a smaller --max-new-tokens") from None
    terminal.write("\n")


def chat(
    checkpoint: Path, images: Sequence[Path], *, template: str | None, max_new_tokens: int, temperature: float, precision: str
) -> None:
    """`fastllava chat`: load the model, show it the pictures, then answer what is typed or piped in. Raises UserError."""
    if not math.isfinite(temperature):
        raise UserError(f"--temperature: {temperature} is no temperature; write 0, or a number such as 0.2")
    if missing := [path for path in images if not path.is_file()]:
        raise UserError(f"--image: {missing[0]} is not there; give a picture's file")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    say = speaker(Console(stderr=True))
    trained = load_trained(checkpoint, say, precision=precision)
    trained = trained if template is None else trained.with_template(template)
    if temperature:
        torch.seed()
    conversation = Conversation(trained, TransformersEngine(trained, 1), max_new_tokens, temperature)
    terminal = Terminal(_write, say, interactive)
    for path in images:
        _obey("/image", str(path), conversation, terminal)
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 (input() then edits lines)
        conversation.warm_up()
        say("/help lists the commands")
    with every_interrupt_is_the_first() if interactive else nullcontext():
        talk(conversation, terminal)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
