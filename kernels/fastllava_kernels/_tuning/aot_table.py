"""The table of what compiled kernels take, in Markdown: written, read again, and compared with an earlier one."""

import re
from collections.abc import Iterator, Mapping, Sequence

from fastllava_kernels._tuning.machine_code import TMA, Resources, bits

Row = Mapping[str, str]
"""A line of the table, by its columns."""

_WHAT = ("kernel", "arch", "tuned with", "rows up to", "sizes", "configuration")
_FIGURES = ("registers", "shared bytes", "spills", "warps", "loads", "stores", "tensor core", "async copy")
COLUMNS = (*_WHAT, *_FIGURES)

ALIGNED, ANY_SIZE = "16 divides", "any"


def row(what: Sequence[str], resources: Resources, warps: int) -> Row:
    """The line of a kernel; `what`: its first columns; `warps`: how many a multiprocessor holds at once."""
    r = resources
    products = " ".join(f"{count} {name}" for name, count in sorted(r.products.items()))
    figures = r.registers, r.shared, r.spilled, warps, _accesses(r.loads), _accesses(r.stores), products or "none", r.async_copy
    return dict(zip(COLUMNS, (*what, *map(str, figures)), strict=True))


def render(rows: Sequence[Row]) -> Iterator[str]:
    """The lines in Markdown."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    for one in rows:
        yield f"| {' | '.join(one[column] for column in COLUMNS)} |"


def parse(text: str) -> list[Row]:
    """The lines of the tables in `text` that have these columns; those of another form are left out."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in found if len(cells) == len(COLUMNS) and cells != list(COLUMNS)]


def worse(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """What became worse, in words: a line for each figure of a kernel that both have."""
    earlier = {_key(one): one for one in before}
    return [f"{' '.join(_key(one))}: {what}" for one in now if _key(one) in earlier for what in _worse(earlier[_key(one)], one)]


def _key(one: Row) -> tuple[str, ...]:
    """What a line is of; its configuration may change."""
    return one["kernel"], one["arch"], one["tuned with"], one["rows up to"], one["sizes"]


def _worse(before: Row, now: Row) -> Iterator[str]:
    for column in ("loads", "stores"):
        was, is_now = bits(_widths(before[column])), bits(_widths(now[column]))
        if 0 < is_now < was:
            yield f"{column} most of its bytes in {is_now} bits, {was} before"
    if int(now["warps"]) < int(before["warps"]):
        yield f"{now['warps']} warps on a multiprocessor, {before['warps']} before"
    if int(now["spills"]) > int(before["spills"]):
        yield f"spills ({now['spills']}), {before['spills']} before"
    for instruction in ("HGMMA", "HMMA"):
        if f" {instruction}." in before["tensor core"] and f" {instruction}." not in now["tensor core"]:
            yield f"no tensor-core instruction {instruction} any more"


def _accesses(accesses: Mapping[int, int]) -> str:
    widest_first = sorted(accesses.items(), reverse=True)
    return " ".join(f"{count}x{'TMA' if width == TMA else width}" for width, count in widest_first) or "none"


def _widths(accesses: str) -> Mapping[int, int]:
    return {TMA if width == "TMA" else int(width): int(count) for count, width in re.findall(r"(\d+)x(\d+|TMA)", accesses)}
