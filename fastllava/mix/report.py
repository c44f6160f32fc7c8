"""What a built mix holds, for a person."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def table(report: Mapping[str, Any]) -> Table:
    """A line for each source, and their sum."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("source")
    for name in ("records", "turns", "tokens", "images missing", "published"):
        shown.add_column(name, justify="right")
    sources = report["sources"]
    for name, entry in sources.items():
        shown.add_row(name, *(_figure(entry[key]) for key in ("records", "turns", "tokens", "images_missing", "published")))
    if len(sources) > 1:
        shown.add_row("all", *(_figure(_sum(sources, key)) for key in ("records", "turns", "tokens", "images_missing")), "")
    return shown


def _sum(sources: Mapping[str, Any], key: str) -> int | None:
    figures = [entry[key] for entry in sources.values()]
    return None if None in figures else sum(figures)


def _figure(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
