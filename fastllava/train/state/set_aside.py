"""The samples that a run goes on without: `output_dir/set_aside.jsonl`, a JSON object a line, which a user may add to.

Each has the record's `id`, `index` (its row in the prepared set), `image`, `reason`, and the `step` from which on it is left out.
A line by hand needs the `id` alone; it holds from the step on at which the run next begins.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllava.config import Config
from fastllava.console.printable import quoted
from fastllava.data.loader import BadImage
from fastllava.data.prepared import PreparedSet
from fastllava.disk import sync
from fastllava.distributed.processes import Processes
from fastllava.errors import UserError

SET_ASIDE = "set_aside.jsonl"
_MANY = 4
"""Images of one process and step that are bad all together are not to blame each for itself."""

Entry = dict[str, Any]


def begin(config: Config, prepared: PreparedSet, known: Mapping[int, int], step: int) -> dict[int, int]:
    """The step from which on each sample is left out, by its index, in a run that begins before `step`, and the list written anew.

    `known` is what the checkpoint holds, which nothing changes: what was computed without a sample stays so. Raises UserError
    for a line that names no record, and when they are too many.
    """
    path = config.output_dir / SET_ASIDE
    entries: dict[int, Entry] = {}
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            for entry in _read(line, f"{path} line {number}", prepared, step):
                entries.setdefault(entry["index"], entry)
    for index, since in known.items():
        if not 0 <= index < len(prepared):
            raise UserError(f"output_dir: the checkpoint sets sample {index} aside, of {len(prepared)}; go on from an older one")
        entries[index] = {**entries.get(index, _entry(prepared, index, "set aside before")), "step": since}
    if entries:
        _check_budget(config, prepared, len(entries))
        _write(path, entries.values())
    return {index: entries[index]["step"] for index in sorted(entries)}


def add(config: Config, prepared: PreparedSet, bad: Iterable[BadImage], held: int, step: int) -> None:
    """Put samples, to the `held` ones that are there, on the list from `step` on. Raises UserError when they become too many."""
    path = config.output_dir / SET_ASIDE
    new = [_entry(prepared, one.sample, one.reason, step) for one in bad]
    _check_budget(config, prepared, held + len(new), f"; of step {step}: {'; '.join(one.in_words() for one in list(bad)[:3])}")
    there = [json.loads(line) for line in _lines(path) if line.strip()]
    _write(path, [*there, *new])


def found_by_any(group: Processes, images: Path | None, mine: Sequence[BadImage], read: int) -> list[BadImage]:
    """What all processes, which call this together, could not read of the same samples, by number.

    `read` is how many samples with images this one looked at. Raises UserError, on all, when the images are not to blame each for itself.
    """
    with group.together():
        wrong = nothing_is_there(images, mine, read) if mine and images is not None else None
        if wrong is not None:
            raise UserError(f"{wrong} and start the same command again")
    return sorted((one for found in group.gather(tuple(mine)) for one in found), key=lambda one: one.sample)


def nothing_is_there(images: Path, bad: Iterable[BadImage], read: int) -> str | None:
    """Why these images' failing is not theirs, of `read` samples that a process read for a step: the folder is gone, or all fail."""
    try:
        if not any(images.iterdir()):
            return f"data.images: {images} is empty; is its disk mounted? Mend that"
    except OSError as error:
        return f"data.images: {images} cannot be looked into ({error.strerror}); mend that"
    bad = list(bad)
    if len(bad) == read >= _MANY:
        return f"data.images: the images of all {read} samples of a step fail, such as that of {bad[0].in_words()}; mend that"
    return None


def _check_budget(config: Config, prepared: PreparedSet, count: int, found: str = "") -> None:
    records, quarantined = prepared.manifest["records"], prepared.manifest["quarantined"]
    share, most = (quarantined + count) / records, config.data.max_quarantined_share
    if quarantined + count > most * records:
        raise UserError(
            f"data.max_quarantined_share: {quarantined:,} quarantined and {count:,} set aside of {records:,} records are {share:.2%}, "
            f"and {most:.2%} may be (listed in {config.output_dir / SET_ASIDE}{found}); restore the images, or write "
            f"data.max_quarantined_share={min(1.0, share + 0.0001):.4f}, and start the same command again"
        )


def _entry(prepared: PreparedSet, index: int, reason: str, step: int | None = None) -> Entry:
    row = prepared.row(index)
    return {"id": row.id, "index": index, "image": row.shows, "reason": reason, "step": step}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path}: is no text in UTF-8 ({error}); mend it") from None


def _read(line: str, place: str, prepared: PreparedSet, step: int) -> list[Entry]:
    """The samples that a line means. Raises UserError."""
    remedy = 'write one such as {"id": "the record\'s id"}, or remove it'
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{place}: is no JSON; {remedy}") from None
    if not isinstance(given, dict) or not isinstance(given.get("id"), (str, int)) or isinstance(given["id"], bool):
        raise UserError(f"{place}: names no record; {remedy}")
    name, index, since = str(given["id"]), given.get("index"), given.get("step")
    if any(number is not None and (type(number) is not int or number < 0) for number in (index, since)):
        raise UserError(f"{place}: index and step are whole numbers; mend them, or leave them out")
    if index is not None and index < len(prepared) and prepared.row(index).id == name:
        indices = [index]
    else:
        indices = prepared.named(name)
    # A line that a run wrote may be of data that have been prepared again since, without the record.
    if not indices and index is None:
        raise UserError(f"{place}: no sample of the prepared set is called {quoted(name)}; {remedy}")
    # A step that lies behind is one that was taken with the sample.
    since = step if since is None else max(since, step)
    return [_entry(prepared, i, str(given.get("reason", "by hand")), since) for i in indices]


def _write(path: Path, entries: Iterable[Entry]) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
