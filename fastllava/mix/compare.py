"""How one mix differs from another in records, turns and prompts, kind by kind; and a given file from the published counts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from fastllava.config.keys import MOST_IMAGES
from fastllava.data.checks import BadRecord, check_record
from fastllava.data.records import read_records
from fastllava.errors import UserError
from fastllava.mix.kinds import PUBLISHED, kind_of, prompts_of
from fastllava.mix.progress import Working
from fastllava.mix.tally import Tally

Kinds = dict[str, Tally]


def kinds_in(path: Path, working: Working) -> tuple[Kinds, int]:
    """The counts of a LLaVA JSON by kind of record, and how many of its elements are no records. Raises UserError."""
    kinds: Kinds = {}
    broken = 0
    try:
        working.begin(path.name, path.stat().st_size)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a LLaVA JSON file") from None
    for raw in read_records(path):
        working.advance(raw.size + 2)
        try:
            if raw.problem is not None:
                raise raw.problem
            check_record(raw.value, raw.index, MOST_IMAGES)
        except BadRecord:
            broken += 1
            continue
        prompts = prompts_of(raw.value)
        kinds.setdefault(kind_of(raw.value, prompts), Tally()).add(raw.value, prompts, None)
    if not kinds:
        raise UserError(f"{path}: holds no LLaVA record; give a file such as llava_v1_5_mix665k.json")
    return kinds, broken


def differences(built: Kinds | None, given: Kinds, broken: int) -> dict[str, Any]:
    """By kind what the given file has, what the built mix has, and what was published; `built` None where none was built."""
    names = [*PUBLISHED, *sorted({*given, *(built or {})} - PUBLISHED.keys())]
    kinds: dict[str, Any] = {}
    for name in names:
        if name not in given and name not in (built or {}) and built is not None:
            continue
        entry: dict[str, Any] = {"published": PUBLISHED.get(name), "given": given.get(name, Tally()).as_json(tokens=False)}
        if built is not None:
            entry["built"] = built.get(name, Tally()).as_json(tokens=False)
        kinds[name] = entry
    return {"kinds": kinds, "broken_records": broken}


def table(found: Mapping[str, Any]) -> Table:
    """The differences for a person: a line for each kind, and one for each of its prompts that differs."""
    both = any("built" in entry for entry in found["kinds"].values())
    shown = Table(box=None, pad_edge=False)
    for name in ("kind", "what", "given", *(("built", "difference") if both else ("published", "difference"))):
        shown.add_column(name, justify="left" if name in ("kind", "what") else "right")
    for name, entry in found["kinds"].items():
        given, other = entry["given"], entry.get("built")
        rows = [("records", given["records"], entry["published"] if other is None else other["records"])]
        if other is not None:
            rows.append(("turns", given["turns"], other["turns"]))
            for prompt in sorted({*given["questions_by_prompt"], *other["questions_by_prompt"]}):
                rows.append((f"prompt: {prompt}", given["questions_by_prompt"].get(prompt, 0), other["questions_by_prompt"].get(prompt, 0)))
        else:
            rows.append(("turns", given["turns"], None))
            rows += [(f"prompt: {prompt}", count, None) for prompt, count in given["questions_by_prompt"].items()]
        for number, (what, here, there) in enumerate(rows):
            shown.add_row("" if number else name, what, f"{here:,}", *_difference(here, there))
    return shown


def _difference(here: int, there: int | None) -> tuple[str, str]:
    if there is None:
        return "", ""
    return f"{there:,}", "equal" if here == there else f"{here - there:+,}"
