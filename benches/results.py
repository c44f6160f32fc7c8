"""Rows of results as they lie on disk: JSON lines, to which runs are appended."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """One line more; the folder is made when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def finite(value: float | None) -> float | None:
    """`value`, or None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def latest(path: Path, keys: Sequence[str]) -> list[Row]:
    """The rows of a file, of those that agree in `keys` the last one only, in the order in which each was first there."""
    found: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[tuple(row[key] for key in keys)] = row
    return list(found.values())


def files(results: Path, kind: str) -> list[Path]:
    """results/<kind>*.jsonl, then those of the folders in it, as `fastllava bench gpu` writes them."""
    return [*sorted(results.glob(f"{kind}*.jsonl")), *sorted(results.glob(f"*/{kind}*.jsonl"))]


def between_markers(text: str, name: str, generated: str) -> str:
    """`text` with what stands between `<!-- name: begin -->` and `<!-- name: end -->` replaced. Raises ValueError without them."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no markers {begin.strip()} and {end}")
    return before + begin + generated.rstrip("\n") + "\n" + end + after
