"""`fastllava chat`: the same answers as `fastllava answer`, streamed; pictures, history, prompts, and what a person may press."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastllava import cli
from fastllava.batch import IMAGE_ID
from fastllava.data.asking import Turn, ask
from fastllava.errors import UserError
from fastllava.evaluate import chat
from fastllava.evaluate import conversation as conversation_module
from fastllava.evaluate.answer import answer_questions
from fastllava.evaluate.checkpoint import Trained, load_trained
from fastllava.evaluate.conversation import Conversation, Text
from fastllava.evaluate.engines.transformers_engine import TransformersEngine
from fastllava.evaluate.questions import Question

NEW = 24


@pytest.fixture(scope="module")
def trained(tiny_llava) -> Trained:
    return load_trained(tiny_llava)


@pytest.fixture
def conversation(trained: Trained) -> Conversation:
    return Conversation(trained, TransformersEngine(trained, 1), NEW)


@pytest.fixture
def image(golden: Path) -> Path:
    return golden / "trace" / "images" / "img3.png"


def said_of(conversation: Conversation, lines: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """What a conversation of these lines, piped in, writes, and its remarks."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    written, remarks = [], []
    chat.talk(conversation, chat.Terminal(written.append, remarks.append, interactive=False))
    return "".join(written), remarks


def answers_of(conversation: Conversation) -> list[str | None]:
    return [turn.answer for turn in conversation.turns]


def test_a_first_answer_is_that_of_answer_and_of_the_original(conversation, trained, golden, tmp_path) -> None:
    rows = json.loads((golden / "generation" / "expected.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["mode"] == "vicuna_v1" and "\n" not in row["question"]]
    assert rows
    for row in rows:
        picture = golden / "trace" / "images" / row["image"] if row["has_image"] else None
        answer_questions(trained, [Question(0, row["question"], picture, row["question"])], tmp_path / "out.jsonl", max_new_tokens=NEW)
        (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
        (tmp_path / "out.jsonl").unlink()
        conversation.show(picture)
        pieces: list[str] = []
        conversation.answer(row["question"], pieces.append)
        assert answers_of(conversation) == [row["text"]] == [json.loads(line)["text"]]
        assert "".join(pieces) == row["text"]
        assert len(pieces) > 5
        assert conversation.asked == (row["prompt"], row["input_ids"])


def test_a_later_question_goes_on_from_what_was_said(conversation, trained, image) -> None:
    conversation.show(image)
    for question in ("Where is the goat?", "and now?"):
        conversation.answer(question, lambda text: None)
    first, second = answers_of(conversation)
    text, ids = conversation.asked or ("", [])
    assert ids == ask(trained.form, [Turn("Where is the goat?", 1, first), Turn("and now?")], trained.tokenizer)
    assert text.endswith(f"USER: <image>\nWhere is the goat? ASSISTANT: {first}</s>USER: and now? ASSISTANT:")
    assert second
    conversation.reset()
    conversation.answer("Where is the goat?", lambda text: None)
    assert answers_of(conversation) == [first]


def test_a_temperature_draws_and_zero_does_not(trained, image) -> None:
    found = set()
    for temperature in (0.0, 0.0, 1.5, 1.5, 1.5):
        one = Conversation(trained, TransformersEngine(trained, 1), NEW, temperature)
        one.show(image)
        one.answer("Where is the goat?", lambda text: None)
        found.add((temperature > 0, one.turns[0].answer))
    assert len([text for drawn, text in found if not drawn]) == 1
    assert len([text for drawn, text in found if drawn]) > 1


def test_the_oldest_rounds_are_forgotten_and_that_is_said(conversation, trained, image, monkeypatch) -> None:
    conversation.show(image)
    lone = conversation.tokens(conversation.prompt([], "one")[1])
    monkeypatch.setattr(Conversation, "context", lone + NEW + 60)
    monkeypatch.setattr(conversation_module, "FOR_THE_ANSWER", 1)
    written, remarks = said_of(conversation, "one\ntwo\nthree\nfour\n", monkeypatch)
    assert len(written.splitlines()) >= 4
    assert 0 < len(conversation.turns) < 4
    assert conversation.turns[-1].question == "four"
    assert any(
        re.fullmatch(r"the conversation has outgrown the model's \d+ tokens: the oldest round is forgotten", line) for line in remarks
    )
    ids = (conversation.asked or ("", []))[1]
    assert conversation.tokens(ids) + NEW <= conversation.context
    # The picture stands before the oldest question that is left.
    assert ids == ask(
        trained.form,
        [Turn(conversation.turns[0].question, 1, conversation.turns[0].answer), *conversation.turns[1:-1], Turn("four")],
        trained.tokenizer,
    )
    before = list(conversation.turns)
    _, (remark,) = said_of(conversation, f"{'long ' * 400}\n", monkeypatch)
    assert re.fullmatch(r"the question makes a prompt of [\d,]+ tokens, and the model takes \d+; ask a shorter one", remark)
    assert conversation.turns == before


def test_a_picture_that_cannot_be_seen_is_one_line_and_the_conversation_goes_on(conversation, image, tmp_path, monkeypatch) -> None:
    (tmp_path / "damaged.png").write_bytes(image.read_bytes()[:-40])
    (tmp_path / "text.png").write_text("no picture")
    bad = (tmp_path / "damaged.png", tmp_path / "text.png", tmp_path / "none.png", tmp_path, "nul\0")
    written, remarks = said_of(
        conversation, f"/image {image}\nWhere is the goat?\n" + "".join(f"/image {path}\n" for path in bad), monkeypatch
    )
    assert remarks[0] == f"the picture is {image}"
    assert len(remarks) == 1 + len(bad)
    for remark in remarks[1:]:
        assert re.fullmatch(r"/image: .*; the conversation is as it was", remark), remark
    assert answers_of(conversation) == [written.removesuffix("\n")]
    again, remarks = said_of(conversation, "/reset\nWhere is the goat?\n", monkeypatch)
    assert (again, remarks) == (written, ["the conversation begins anew, about the same picture"])


def test_a_new_picture_begins_anew_and_says_why(conversation, image, monkeypatch) -> None:
    lines = f"/image {image}\nWhat?\n/image {image.with_name('img1.png')}\nWhat?\n/image\nWhat?\n"
    _, remarks = said_of(conversation, lines, monkeypatch)
    anew = "and the conversation begins anew: LLaVA-1.5 was trained with one picture a conversation"
    assert remarks[1:] == [f"the picture is {image.with_name('img1.png')}, {anew}", f"there is no picture now, {anew}"]
    assert len(conversation.turns) == 1
    assert IMAGE_ID not in (conversation.asked or ("", [IMAGE_ID]))[1]


def test_commands(conversation, image, monkeypatch) -> None:
    written, remarks = said_of(conversation, "/prompt\n/help\n\n/nosuch thing\n", monkeypatch)
    assert written == f"{chat.HELP}\n"
    assert remarks == [
        "/prompt: nothing was asked yet",
        "'/nosuch' is no command; write /help for those there are, or // before a question",
    ]
    conversation.show(image)
    conversation.answer("Where?", lambda text: None)
    text, ids = conversation.asked or ("", [])
    written, remarks = said_of(conversation, "/prompt\n/quit\nafter\n", monkeypatch)
    assert written == f"{text}\n"
    assert text.endswith("USER: <image>\nWhere? ASSISTANT:")
    assert remarks == [f"{len(ids)} ids, one of them for the picture, which takes the place of 16"]
    said_of(conversation, "//image is what?\n", monkeypatch)
    assert conversation.turns[-1].question == "/image is what?"


def test_text_comes_in_whole_characters_and_does_nothing_to_the_terminal(trained) -> None:
    tokenizer = trained.tokenizer
    text = "Gru\u00df \U0001f410 \x1b[31mred\x07\u202e end"
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text), "this tokenizer spells the goat in bytes"
    pieces: list[str] = []
    stream = Text(tokenizer, (2,), pieces.append)
    stream.put(torch.tensor([[5, 6]]))
    for token in [*tokens, 2]:
        stream.put(torch.tensor([token]))
    assert not [piece for piece in pieces if "\ufffd" in piece]
    assert stream.end() == text
    assert "".join(pieces) == "Gru\u00df \U0001f410 \\x1b[31mred\\x07\\u202e end"
    stream.end()
    assert "".join(pieces).count("end") == 1


def test_an_interrupted_answer_counts_as_far_as_it_came(conversation, image, monkeypatch) -> None:
    conversation.show(image)
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Where is the goat?", write)
    assert 0 < len(answers_of(conversation)[0] or "") < NEW
    assert "".join(pieces) == answers_of(conversation)[0]
    monkeypatch.setattr(Conversation, "_generate", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    _, remarks = said_of(conversation, "and now?\n", monkeypatch)
    assert remarks == ["the GPU's memory is full; write /reset, or begin with --precision bf16 or a smaller --max-new-tokens"]
    assert len(conversation.turns) == 1


def test_a_damaged_picture_to_begin_with_ends_where_nobody_can_give_another(tiny_llava, image, tmp_path) -> None:
    (tmp_path / "damaged.png").write_bytes(image.read_bytes()[:-40])
    done = CliRunner().invoke(cli.app, ["chat", str(tiny_llava), "--image", str(tmp_path / "damaged.png")], input="What?\n")
    assert re.fullmatch(r"--image: image .*damaged\.png\b.*", str(done.exception))
    assert done.stdout == ""


def test_mistakes_on_the_command_line_are_said_before_the_model_is_read(tmp_path) -> None:
    options = {"template": None, "max_new_tokens": 8, "temperature": 0.0, "precision": "auto"}
    with pytest.raises(UserError, match=r"^--image: there is no file '.*none.png'; give the path of a picture$"):
        chat.chat(tmp_path, [tmp_path / "none.png"], **options)
    with pytest.raises(UserError, match=r"^--temperature: nan is no temperature"):
        chat.chat(tmp_path, [], **(options | {"temperature": float("nan")}))


def test_piped_lines_give_answers_on_stdout_and_remarks_on_stderr(tiny_llava, golden, image) -> None:
    rows = json.loads((golden / "generation" / "expected.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in rows if row["question_id"] == 3)
    lines = f"{row['question']}\n/image none.png\n\udcff\n".encode(errors="surrogateescape")
    other = image.with_name("img1.png")
    words = ["chat", str(tiny_llava), "--image", str(other), "--image", str(image), "--max-new-tokens", str(NEW)]
    done = CliRunner().invoke(cli.app, words, input=lines)
    assert done.exit_code == 0, done.output
    answers = done.stdout.splitlines()
    assert answers[0] == row["text"]
    assert len(answers) >= 2
    assert f"the picture is {other}\nthe picture is {image}, and the conversation begins anew: {chat.ONE_PICTURE}\n" in done.stderr
    assert "/image: there is no file 'none.png'; give the path of a picture; the conversation is as it was\n" in done.stderr


class Screen:
    """A program at the other end of a pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(theirs)
        self.ours, self.text, self.at = ours, "", 0

    def wait_for(self, text: str, seconds: float = 90.0) -> None:
        """Read until `text` stands behind what was waited for before."""
        until = time.monotonic() + seconds
        while (found := self.text.find(text, self.at)) < 0:
            assert time.monotonic() < until, self.text
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.ours, 4096).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended: {self.text}") from None
        self.at = found + len(text)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


def _own_terminal() -> None:
    """In the new process: its standard input is the terminal that sends it signals."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.exhaustive
def test_a_person_at_a_terminal(tiny_llava, image) -> None:
    program = [sys.executable, "-c", "from fastllava.entry import main; main()"]
    screen = Screen([*program, "chat", str(tiny_llava), "--max-new-tokens", "100000", "--image", "none.png"])
    try:
        screen.wait_for("--image: there is no file 'none.png'; give the path of a picture")
        screen.wait_for("/help lists the commands")
        screen.wait_for("> ")
        screen.type(f"/image {image}\n")
        screen.wait_for("the picture is")
        for _ in range(2):
            screen.wait_for("> ")
            screen.type("Where is the goat?\n")
            screen.wait_for("3ananan")
            time.sleep(0.3)
            screen.type("\x03")
            screen.wait_for("stopped")
            screen.type("/reset\n")
            screen.wait_for("begins anew")
        screen.wait_for("> ")
        screen.type("half a que")
        screen.wait_for("half a que")
        # The interpreter's line editor loses a Ctrl-C of the microseconds before it waits for a key.
        time.sleep(0.3)
        screen.type("\x03")
        screen.wait_for("Ctrl-D or /quit ends")
        screen.wait_for("> ")
        screen.type("\x04")
        assert screen.process.wait(timeout=30) == 0
    finally:
        if screen.process.poll() is None:
            os.killpg(screen.process.pid, signal.SIGKILL)
        os.close(screen.ours)
    assert "Traceback" not in screen.text
