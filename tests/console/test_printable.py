"""What reaches a terminal: nothing that acts on it, whoever wrote it."""

import io

import pytest
from rich.console import Console

from fastllava import cli
from fastllava.console.printable import printable, quoted, shortened
from fastllava.console.speaker import speaker
from fastllava.errors import UserError

# Title and clear screen (7 bits and 8 bits), carriage return, delete, right-to-left override, isolates, line separator, half a character.
ACTS = [
    "\x1b]0;x\x07",
    "\x1b[2J",
    "\x9b2J",
    "\x90q",
    "\r",
    "\x08",
    "\x7f",
    "\u202e",
    "\u2066",
    "\u2069",
    "\u2028",
    "\u200b",
    "\udc80",
    "\x00",
]


@pytest.mark.parametrize("text", ACTS)
def test_what_acts_on_a_terminal_is_written_out(text: str) -> None:
    shown = printable(f"a{text}b\n")
    assert shown.startswith("a\\")
    assert shown.endswith("b\n")
    assert shown.strip("\n").isprintable()


def test_what_people_write_stays() -> None:
    text = "Größe 好\u3000的 \U0001f600 x\u00a0y\n\tz é"
    assert printable(text) == text


@pytest.mark.parametrize("text", ACTS)
def test_speakers_and_error_lines(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    speaker(Console(file=out, force_terminal=True))(f"a :dog: [red]{text}")
    assert out.getvalue() == f"a :dog: [red]{printable(text)}\n"

    def raises() -> None:
        raise UserError(f"record {text}: bad")

    monkeypatch.setattr(cli, "app", raises)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"error: record {printable(text)}: bad\n"


def test_long_values_are_not_copied() -> None:
    assert quoted("ab\n") == "'ab\\n'"
    assert quoted("x" * 10**6) == f"'{'x' * 80}'... (1,000,000 characters)"
    assert shortened("x" * 10**6, 3) == "xxx... (1,000,000 characters)"
