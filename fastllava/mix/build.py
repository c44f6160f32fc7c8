"""Builds a mix: every source to records, then all of them to one LLaVA JSON, a report and a manifest.

Annotations and records lie on the disk while they are worked on, in the folder that is written to; it gets its name once
everything is there.
"""

import json
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import fastllava
from fastllava.console.printable import quoted
from fastllava.data.tokenizer import Tokenizer
from fastllava.disk import described as described_file
from fastllava.disk import held_alone, sync, write_json, writing
from fastllava.errors import UserError
from fastllava.mix.config import Mix
from fastllava.mix.conversation import BadRow, Conversation, record_of
from fastllava.mix.draw import Draw
from fastllava.mix.inputs import check_inputs, described, files_of, stamps
from fastllava.mix.keys import SourceKeys
from fastllava.mix.kinds import prompts_of
from fastllava.mix.progress import Working
from fastllava.mix.run import Dropped, Run
from fastllava.mix.shelf import Texts
from fastllava.mix.sources import FORMATS
from fastllava.mix.tally import Tally

FORMAT = 1
"""Goes up when the same files and config would give another mix."""
RECORDS, REPORT, MANIFEST, DROPPED = "mix.json", "report.json", "manifest.json", "dropped.jsonl"
_MAY_BE_BAD = 10
"""So many bad annotations of a source are borne whatever their share."""


@dataclass(frozen=True)
class Built:
    """A mix on the disk."""

    folder: Path
    report: dict[str, Any]


@dataclass
class _Part:
    """What one source gave."""

    keys: SourceKeys
    begin: int
    """Number of its first record among all that were kept on the disk."""
    end: int
    dropped: Dropped
    read: int
    records_before_images: int
    drawn: "array[int]"
    """A drawn number for each of its records, by id and image, so that one record more or less changes the sample by one at most."""


def build(mix: Mix, out: Path, working: Working) -> Built:
    """Write the mix to the folder `out`, which must be empty or new, or hold the very same mix. Raises UserError."""
    out = Path(os.path.abspath(out))
    check_inputs(mix)
    tokenizer = None if mix.tokenizer is None else _tokenizer(mix.tokenizer)
    with working:
        before_reading = stamps(mix)
        inputs = described(mix, working)
        manifest = {
            "format": FORMAT,
            "made_with": {"fastllava": fastllava.__version__},
            "config": mix_as_json(mix),
            "inputs": inputs,
            "tokenizer": None if tokenizer is None else tokenizer.digest,
        }
        if (before := _found(out, manifest)) is not None:
            working.say(f"{out} holds this mix already: the same config and the same files")
            return before
        with _alone(out):
            partial = out.with_name(f".{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                with writing(out.parent):
                    partial.mkdir()
                    report = _fill(mix, partial, tokenizer, manifest, working)
                    if changed := [path for path, stamp in stamps(mix).items() if stamp != before_reading[path]]:
                        raise UserError(f"{changed[0]}: changed while it was read; start again when it is complete")
                    if out.is_dir():
                        out.rmdir()
                    partial.rename(out)
                    sync(out.parent)
            except BaseException:
                # A full disk above all: what is of no use frees the space.
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return Built(out, report)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold `out` for this process. Raises UserError when another one builds there, OSError."""
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.with_name(f".{out.name}.lock").open("w")
    with file:
        if not held_alone(file):
            raise UserError(f"--out: another process builds a mix in {out}; wait for it or choose another folder")
        yield


def mix_as_json(mix: Mix) -> dict[str, Any]:
    """The config with every key, as the manifest holds it."""
    values = {key: getattr(mix, key) for key in type(mix).model_fields if key != "sources"}
    if mix.max_images == 1:
        # As it was all there was, mixes built then stay good.
        del values["max_images"]
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    return {**plain, "sources": [source.model_dump(mode="json") for source in mix.sources]}


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.load(path)
    except UserError as error:
        raise UserError(f"tokenizer: {error}; or write null to count no tokens") from None


def _found(out: Path, manifest: dict[str, Any]) -> Built | None:
    """The mix in `out`, where it is this one; None where `out` is empty or new. Raises UserError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    remedy = "choose another folder, or remove it"
    if not out.is_dir():
        raise UserError(f"--out: {out} is a file; choose a folder")
    try:
        there = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        same = {key: there[key] for key in manifest} == json.loads(json.dumps(manifest))
        whole = all((out / name).stat().st_size == size["bytes"] for name, size in there["outputs"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--out: {out} is not empty; {remedy}") from None
    if not same or not whole:
        why = "another mix: its config or its files were others" if same is False else "this mix, damaged"
        raise UserError(f"--out: {out} holds {why}; {remedy}")
    return Built(out, report)


def _fill(mix: Mix, folder: Path, tokenizer: Tokenizer | None, manifest: dict[str, Any], working: Working) -> dict[str, Any]:
    """All files of the mix, on the disk; what the report says."""
    scratch = folder / "scratch"
    scratch.mkdir()
    records = Texts(scratch / "records")
    with (folder / DROPPED).open("w", encoding="utf-8") as dropped:
        parts = [_read(mix, keys, records, scratch, tokenizer, dropped, working) for keys in mix.sources]
        taken = [_sampled(part) for part in parts]
    order = np.concatenate(taken)
    if not len(order):
        raise UserError("sources: not one record is left; report what was dropped is in the lines above, so mend the files or the rules")
    if mix.order == "shuffled":
        order = order[Draw(mix.seed, "order of the mix").indexes(len(order))]
    of = np.repeat(np.arange(len(parts)), [part.end - part.begin for part in parts])
    tallies = _write(folder / RECORDS, records, order, of, len(parts), tokenizer, working)
    records.close()
    shutil.rmtree(scratch)
    report = _report(mix, parts, tallies, tokenizer is not None)
    write_json(folder / REPORT, report)
    for name in (RECORDS, DROPPED):
        sync(folder / name)
    outputs = {name: described_file(folder / name) for name in (RECORDS, REPORT, DROPPED)}
    write_json(folder / MANIFEST, {**manifest, "outputs": outputs})
    return report


def _read(mix: Mix, keys: SourceKeys, records: Texts, scratch: Path, tokenizer: Tokenizer | None, file: TextIO, working: Working) -> _Part:
    """Puts the records of one source behind the others. Raises UserError."""
    working.begin(keys.name, sum(path.stat().st_size for _, path in files_of(keys)))
    dropped = Dropped(keys.name, file)
    own = scratch / keys.name
    own.mkdir()
    images = None if mix.images is None else mix.images / keys.images
    draw = _draw(mix, keys)
    run = Run(keys.name, draw, own, dropped, working.advance, images, tokenizer, mix.max_images)
    look = _ImageLook(mix, keys)
    begin, before_images, drawn = len(records), 0, array("Q")
    read = FORMATS[keys.format][1]
    try:
        for found in read(keys, run):
            try:
                record = record_of(found, keys.images) if isinstance(found, Conversation) else found
                before_images += 1
                look(record.get("image"))
            except BadRow as problem:
                name = found.id if isinstance(found, Conversation) else found.get("id")
                dropped.bad(problem.reason, f"record {name}", problem.detail)
                continue
            records.add(_in_json(record))
            drawn.append(draw.number("sample", record.get("id"), record.get("image")))
    finally:
        run.close()
        shutil.rmtree(own, ignore_errors=True)
    part = _Part(keys, begin, len(records), dropped, run.read, before_images, drawn)
    _check(mix, part, working)
    return part


def _in_json(record: dict[str, Any]) -> bytes:
    """The record on one line, readable where UTF-8 has its characters: a key that means nothing may hold half of one."""
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(record).encode()


def _check(mix: Mix, part: _Part, working: Working) -> None:
    """Says what the source gave. Raises UserError where it is not what was to be expected."""
    keys, dropped = part.keys, part.dropped
    found = f"sources.{keys.name}: "
    gave = part.end - part.begin
    working.say(f"{keys.name}: {gave:,} records from {part.read:,} annotations" + _left_out(dropped))
    if keys.expect is not None and part.records_before_images != keys.expect:
        raise UserError(
            f"{found}{part.records_before_images:,} records, and expect says {keys.expect:,}; "
            "see that its files are whole and of the right split, or take expect out"
        )
    missing = dropped.reasons["image_missing"]
    bad = dropped.n_bad - missing
    if bad > max(_MAY_BE_BAD, mix.max_bad_share * max(1, part.read)):
        most = max(((count, reason) for reason, count in dropped.reasons.items()), default=(0, ""))[1]
        raise UserError(
            f"{found}{bad:,} of {part.read:,} annotations are bad, most often {most}, and max_bad_share allows {mix.max_bad_share:g}; "
            f"{dropped.first}"
        )
    if not gave:
        why = f"{dropped.first}" if dropped.first else "see that its files and rules.split are the right ones"
        raise UserError(f"{found}not one record is left of {part.read:,} annotations; {why}")


def _left_out(dropped: Dropped) -> str:
    said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.reasons.items()))
    return f"; left out: {said}" if said else ""


def _draw(mix: Mix, keys: SourceKeys) -> Draw:
    return Draw(mix.seed if keys.seed is None else keys.seed, keys.name)


def _sampled(part: _Part) -> np.ndarray:
    """The numbers of the records that are taken, ascending."""
    numbers = np.arange(part.begin, part.end)
    if part.keys.sample is None or part.keys.sample >= len(numbers):
        return numbers
    part.dropped.by_rule("sample", len(numbers) - part.keys.sample)
    return np.sort(numbers[np.argsort(np.asarray(part.drawn), kind="stable")[: part.keys.sample]])


class _ImageLook:
    """Whether a record's image is there."""

    def __init__(self, mix: Mix, keys: SourceKeys) -> None:
        self._root = None if mix.images is None else mix.images.resolve()
        self._what, self._keys, self._last = mix.missing_images, keys, ""

    def __call__(self, shown: str | list[str] | None) -> None:
        """Raises BadRow where an image is missing and so the record is to be left out, UserError where the build is to end."""
        for image in shown if isinstance(shown, list) else [shown]:
            self._look(image)

    def _look(self, image: str | None) -> None:
        if image is None or image == self._last or self._root is None:
            return
        if image.startswith("/") or "\0" in image or ".." in image.split("/") or not image.strip():
            raise BadRow("image_path", f"the image path {quoted(image)} leads out of the images folder; write one below it")
        path = self._root / image
        if self._what != "keep" and not os.path.isfile(path):
            if self._what == "refuse":
                remedy = "put it there, or write missing_images: drop"
                raise UserError(f"sources.{self._keys.name}: there is no image {path}; {remedy}")
            raise BadRow("image_missing", f"there is no file {path}")
        self._last = image


def _write(
    path: Path, records: Texts, order: np.ndarray, of: np.ndarray, n_parts: int, tokenizer: Tokenizer | None, working: Working
) -> list[Tally]:
    """Writes the records in `order`, one a line of an array; counts them by their part, which `of` has by number."""
    tallies = [Tally() for _ in range(n_parts)]
    working.begin(path.name, len(order))
    with path.open("wb") as file:
        for number, text in enumerate(_texts(records, order)):
            file.write(b",\n" if number else b"[\n")
            file.write(text)
            record = json.loads(text)
            tallies[int(of[order[number]])].add(record, prompts_of(record), tokenizer)
            working.advance(1)
        file.write(b"\n]\n")
    return tallies


def _texts(records: Texts, order: np.ndarray) -> Iterator[bytes]:
    return (records[int(index)] for index in order)


def _report(mix: Mix, parts: list[_Part], tallies: list[Tally], tokens: bool) -> dict[str, Any]:
    sources = {}
    for part, tally in zip(parts, tallies, strict=True):
        counts = tally.as_json(tokens)
        sources[part.keys.name] = {
            "format": part.keys.format,
            "annotations": part.read,
            **counts,
            "images_missing": None if mix.images is None else part.dropped.reasons["image_missing"],
            "dropped": dict(sorted(part.dropped.reasons.items())),
            "expected": part.keys.expect,
            "published": part.keys.published,
        }
    return {"records": sum(tally.records for tally in tallies), "order": mix.order, "seed": mix.seed, "sources": sources}
