"""A page: sections of HTML in one file, which loads nothing and in which no text of others can become markup or a script."""

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastllava.console.masking import masked
from fastllava.console.printable import printable, shortened

LONGEST = 4000
"""Characters of one text on a page. Of a longer one the beginning is shown, and how long it is."""
_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own."""

    anchor: str
    """Its name in the page's address, such as data."""
    title: str
    body: Markup
    listed: bool = True
    """Whether the page's list of sections has it."""


@dataclass(frozen=True)
class Tile:
    """A figure that a page begins with."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Notice:
    """A sentence that a reader should not miss."""

    text: str
    serious: bool = False


@dataclass(frozen=True)
class Head:
    """What stands above the sections."""

    title: str
    subtitle: str
    status: str = ""
    """A word or two beside the title, such as complete."""
    mood: str = "good"
    """The colour of the status: good, busy or bad."""
    tiles: Sequence[Tile] = ()
    notices: Sequence[Notice] = ()


def write_page(path: Path, head: Head, sections: Sequence[Section]) -> Path:
    """Write the page to `path`, so that a reader sees the old one or the new one; `path` again. Raises OSError."""
    style, script = _read("page.css"), _read("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    page = fill("page.html", head=head, sections=sections, policy=policy, style=Markup(style), script=Markup(script))  # noqa: S704 (own files)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(page + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def fill(template: str, **values: Any) -> Markup:
    """The template of that name with these values. Every value that is no Markup is escaped, as `clean` leaves it."""
    return Markup(_environment().get_template(template).render(**values))  # noqa: S704 (escaped by the environment)


def clean(value: Any) -> Any:
    """`value` as a reader may get it: nothing invisible, no secret, not endless. Markup and empty values stay as they are."""
    if value is None or isinstance(value, Markup):
        return value if value is not None else ""
    return shortened(printable(masked(str(value))), LONGEST)


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(_TEMPLATES)
    return Environment(loader=loader, autoescape=True, finalize=clean, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls an inline style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
