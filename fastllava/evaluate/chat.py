"""A conversation about pictures in the terminal: answers appear as they are made, and the exact prompt is shown on request."""

import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fastllava.batch import IMAGE_ID
from fastllava.console.printable import printable, quoted
from fastllava.console.speaker import speaker
from fastllava.console.stopping import every_interrupt_is_the_first
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import load_trained
from fastllava.evaluate.conversation import Conversation, Write
from fastllava.evaluate.engines.transformers_engine import TransformersEngine

HELP = """\
/image FILE  ask about this picture, in a new conversation; without FILE about none
/add FILE    show one more picture, before the next question
/reset       begin the conversation anew, about the same picture or pictures
/prompt      show the prompt of the last answer, word for word
/help        show these lines
/quit        end, as Ctrl-D does; Ctrl-C stops an answer
A question that begins with / is written with two: //"""

ONE_PICTURE = "LLaVA-1.5 was trained with one picture a conversation"


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
            try:
                _show(Path(rest).expanduser() if rest else None, conversation, terminal)
            except UserError as error:
                raise UserError(f"/image: {error}; the conversation is as it was") from None
        case "/reset":
            conversation.reset()
            same = "pictures" if len(conversation.pixels) > 1 else "picture"
            terminal.say("the conversation begins anew" + (f", about the same {same}" if conversation.pixels else ""))
        case "/add":
            if not rest:
                raise UserError("/add: names no file; give the path of a picture")
            try:
                conversation.add(Path(rest).expanduser())
            except UserError as error:
                raise UserError(f"/add: {error}; the conversation is as it was") from None
            shown = f"picture {len(conversation.pixels)} is {rest}, and stands before the next question"
            terminal.say(f"{shown}: {ONE_PICTURE}" if len(conversation.pixels) > 1 else shown)
        case "/prompt":
            if conversation.asked is None:
                raise UserError("/prompt: nothing was asked yet")
            text, ids = conversation.asked
            shown, patches = ids.count(IMAGE_ID), conversation.trained.model.spec.patches
            picture = f", one of them for the picture, which takes the place of {patches}" if shown else ""
            if shown > 1:
                picture = f", {shown} of them for the pictures, each of which takes the place of {patches}"
            terminal.write(f"{printable(text)}\n")
            terminal.say(f"{len(ids)} ids{picture}")
        case "/help":
            terminal.write(f"{HELP}\n")
        case _:
            raise UserError(f"{quoted(command, 40)} is no command; write /help for those there are, or // before a question")


def _show(path: Path | None, conversation: Conversation, terminal: Terminal) -> None:
    anew = bool(conversation.pixels or conversation.turns)
    conversation.show(path)
    shown = "there is no picture now" if path is None else f"the picture is {path}"
    terminal.say(f"{shown}, and the conversation begins anew: {ONE_PICTURE}" if anew else shown)


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
    checkpoint: Path,
    images: Sequence[Path],
    *,
    template: str | None,
    max_new_tokens: int,
    temperature: float,
    precision: str,
    base: Path | None = None,
) -> None:
    """`fastllava chat`: load the model, show it the pictures, then answer what is typed or piped in. Raises UserError."""
    if not math.isfinite(temperature):
        raise UserError(f"--temperature: {temperature} is no temperature; write 0, or a number such as 0.2")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if not interactive and (missing := [path for path in images if not path.is_file()]):
        raise UserError(f"--image: there is no file '{missing[0]}'; give the path of a picture")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    say = speaker(Console(stderr=True))
    trained = load_trained(checkpoint, say, precision=precision, base=base)
    trained = trained if template is None else trained.with_template(template)
    if temperature:
        torch.seed()
    conversation = Conversation(trained, TransformersEngine(trained, 1), max_new_tokens, temperature)
    terminal = Terminal(_write, say, interactive)
    for path in images:
        try:
            _show(path, conversation, terminal)
        except UserError as error:
            if not interactive:
                # Nobody is there to give another: answers about no picture would be taken for answers about this one.
                raise UserError(f"--image: {error}") from None
            say(f"--image: {error}")
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
