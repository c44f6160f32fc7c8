"""The data of a run: its counts, lengths and bad records, and some records as the model reads them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from fastllava.batch import IMAGE_ID, ImageSpec
from fastllava.config import Config
from fastllava.data.checks import REASONS
from fastllava.data.loader import BadImages, read_sample
from fastllava.data.plan import held_out_of
from fastllava.data.prepared import PreparedRow, PreparedSet, cache_root
from fastllava.data.prepared_set import MANIFEST, QUARANTINE
from fastllava.data.tokenizer import Tokenizer
from fastllava.disk import read_json_object
from fastllava.errors import UserError
from fastllava.evaluate.report.page import Section, fill
from fastllava.evaluate.report.pictures import Picture, picture_of_pixels
from fastllava.evaluate.report.run import Run
from fastllava.train.state.checkpoint import begun_with

RECORDS = 8
"""Records that are shown."""
TOKENS = 400
"""Tokens of a record that are shown."""
_BAD = 12
"""Bad records that are shown."""
_MOST_BAD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Token:
    """A token of a record that is shown."""

    text: str
    index: int
    supervised: bool
    picture: bool


def find_prepared(run: Run) -> PreparedSet:
    """The prepared set of a run, by its summary, or while it goes on the newest one of its data settings. Raises UserError."""
    said = run.summary.get("prepared")
    if isinstance(said, str):
        return PreparedSet.open(Path(said))
    if run.config is None:
        raise UserError(f"the run's config cannot be read: {run.config_problem}")
    digest, data = begun_with(run.folder), run.config.data
    root = (data.prepared_dir or cache_root() / "prepared").absolute()
    images = None if data.images is None else str(data.images.resolve())
    wanted = {"template": data.template, "image_policy": data.image_policy, "max_tokens": data.max_tokens}
    wanted |= {"max_images": data.max_images if data.max_images > 1 else None}
    wanted |= {"where": {"records": str(data.records.absolute()), "images": images}}
    found = [path for path in root.glob(f"*/{MANIFEST}") if _is_of(path, wanted)] if root.is_dir() else []
    for path in sorted(found, key=lambda path: -path.stat().st_mtime_ns):
        prepared = PreparedSet.open(path.parent)
        if digest in (None, prepared.digest):
            return prepared
    raise UserError(f"no prepared set of {data.records} lies in {root}")


def planned_steps(run: Run, prepared: PreparedSet | None) -> int | None:
    """How many steps the run takes; None where that cannot be told."""
    said = run.summary.get("planned_steps")
    if isinstance(said, int):
        return said
    if run.config is None:
        return None
    train = run.config.train
    if train.max_steps is not None or prepared is None:
        return train.max_steps
    return -(-(len(prepared) - held_out(run.config, prepared)) // train.global_batch) * train.epochs


def held_out(config: Config, prepared: PreparedSet) -> int:
    """How many samples of the set the run is not trained on."""
    return len(held_out_of(len(prepared), config.eval.share, config.train.seed))


def section(run: Run, prepared: PreparedSet | UserError) -> Section:
    """What the set holds; `prepared` is the reason where it is not there."""
    if isinstance(prepared, UserError):
        return Section(
            "data", "Data", fill("data.html", problem=str(prepared), counts=(), charts=(), reasons=(), bad=(), records=(), note="")
        )
    from fastllava.evaluate.report.charts import histogram

    charts: list[Markup] = []
    if len(prepared):
        charts = [
            histogram("Length", "tokens of a sample, patches included", "samples", prepared.n_tokens.tolist()),
            histogram("Supervised", "supervised tokens of a sample", "samples", prepared.n_supervised.tolist()),
        ]
    manifest = prepared.manifest
    reasons = [
        (reason, f"{count:,}", f"{count / manifest['records']:.2%}", REASONS.get(reason, ""))
        for reason, count in sorted(manifest["reasons"].items(), key=lambda item: -item[1])
    ]
    records, note = _records(run, prepared) if run.config is not None else ((), run.config_problem)
    bad = _bad_records(prepared.folder / QUARANTINE)
    body = fill("data.html", problem="", counts=_counts(run, prepared), charts=charts, reasons=reasons, bad=bad, records=records, note=note)
    return Section("data", "Data", body)


def _is_of(path: Path, wanted: Mapping[str, Any]) -> bool:
    try:
        manifest = read_json_object(path)
    except (OSError, ValueError):
        return False
    return all(manifest.get(key) == value for key, value in wanted.items())


def _counts(run: Run, prepared: PreparedSet) -> list[tuple[str, str, str]]:
    """Name, figure and what there is to say of it."""
    manifest, n = prepared.manifest, len(prepared)
    tokens, supervised = int(prepared.n_tokens.sum()), int(prepared.n_supervised.sum())
    text_only, several = int((prepared.n_images == 0).sum()), int((prepared.n_images > 1).sum())
    most = int(prepared.n_images.max(initial=0))
    lengths = np.percentile(prepared.n_tokens, (5, 50, 95)).astype(int).tolist() if n else [0, 0, 0]
    apart = 0 if run.config is None else held_out(run.config, prepared)
    return [
        ("records", f"{manifest['records']:,}", f"{n:,} usable, {manifest['quarantined']:,} quarantined"),
        ("tokens", f"{tokens:,}", "patches included"),
        ("supervised tokens", f"{supervised:,}", f"{supervised / tokens:.1%} of the tokens" if tokens else ""),
        ("with a picture", f"{n - text_only:,}", f"{(n - text_only) / n:.1%} of the samples" if n else ""),
        *([("with several pictures", f"{several:,}", f"{several / n:.1%} of the samples, at most {most} each")] if several else []),
        ("text-only", f"{text_only:,}", f"{text_only / n:.1%} of the samples" if n else ""),
        *([("held out", f"{apart:,}", "samples that are not trained on")] if apart else []),
        ("length, median", f"{lengths[1]:,}", f"tokens; nine of ten samples from {lengths[0]:,} to {lengths[2]:,}"),
        ("cut", f"{manifest['truncated']:,}", f"longer than {manifest['max_tokens']:,} tokens"),
        ("template", str(manifest["template"]), f"image policy {manifest['image_policy']}"),
    ]


def _bad_records(path: Path) -> list[dict[str, Any]]:
    """The first bad record of each reason, then others, at most _BAD."""
    first: dict[str, dict[str, Any]] = {}
    others: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            for line in file:
                entry = json.loads(line)
                if entry["reason"] not in first:
                    first[entry["reason"]] = entry
                elif len(others) < _BAD:
                    others.append(entry)
                if file.tell() > _MOST_BAD_BYTES:
                    break
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return [*first.values(), *others][:_BAD]


def _records(run: Run, prepared: PreparedSet) -> tuple[list[dict[str, Any]], str]:
    """Some records as the model reads them, and what has to be said of how they are shown."""
    config, note, tokenizer = run.config, "", None
    assert config is not None  # noqa: S101 (the caller has looked)
    try:
        tokenizer = Tokenizer.load(config.model.tokenizer or config.model.llm, config.data.legacy)
        if tokenizer.digest != prepared.manifest["tokenizer"]:
            tokenizer, note = None, "The tokenizer is not the one that the set was made with, so tokens are shown by their numbers."
    except UserError as error:
        note = f"The tokenizer cannot be read ({error}), so tokens are shown by their numbers."
    return [_record(prepared, index, config, tokenizer) for index in chosen(prepared)], note


def chosen(prepared: PreparedSet, most: int = RECORDS) -> list[int]:
    """Samples to show, ascending: the longest, the shortest, a text-only one, one of several pictures, and others from all over the set."""
    n = len(prepared)
    if n <= most:
        return list(range(n))
    special = {int(prepared.n_tokens.argmax()), int(prepared.n_tokens.argmin()), *np.flatnonzero(prepared.n_images == 0)[:1].tolist()}
    special |= set(np.flatnonzero(prepared.n_images > 1)[:1].tolist())
    others = np.setdiff1d(np.arange(n), list(special))
    return sorted([*special, *others[np.linspace(0, len(others) - 1, most - len(special)).astype(int)].tolist()])


def _record(prepared: PreparedSet, index: int, config: Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    row = prepared.row(index)
    pictures: list[Picture] = []
    if row.images:
        spec = ImageSpec.read(prepared.manifest["image_spec"])
        try:
            pictures = [picture_of_pixels(pixels) for pixels in read_sample(prepared, spec, config.data, index, 0.0).images]
        except BadImages as problem:
            bad = problem.found[0]
            pictures = [Picture(None, problem=bad.reason if len(row.images) == 1 else f"{bad.path}: {bad.reason}")]
        except UserError as problem:
            pictures = [Picture(None, problem=str(problem))]
    return {
        "row": row,
        "tokens": _tokens(row, tokenizer),
        "left": max(0, len(row.ids) - TOKENS),
        "patches": prepared.manifest["image_spec"]["patches"],
        "total": int(prepared.n_tokens[index]),
        "supervised": int(prepared.n_supervised[index]),
        "pictures": pictures,
    }


def _tokens(row: PreparedRow, tokenizer: Tokenizer | None) -> list[Token]:
    taught = np.zeros(len(row.ids), bool)
    for begin, end in row.supervised:
        taught[begin:end] = True
    found = []
    for token, supervised in zip(row.ids[:TOKENS].tolist(), taught.tolist(), strict=False):
        text = "" if token == IMAGE_ID else f" {token}" if tokenizer is None else tokenizer.piece(token).replace("▁", " ")
        found.append(Token("\n" if text == "<0x0A>" else text, token, supervised, token == IMAGE_ID))
    return found
