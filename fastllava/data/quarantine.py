"""What is said about a prepared set's bad records, and when they are too many."""

import io
import json

from rich.console import Console
from rich.table import Table

from fastllava.console.printable import printable
from fastllava.data.checks import REASONS
from fastllava.data.prepared_set import QUARANTINE, PreparedSet
from fastllava.errors import UserError

_MOST_KEYS = 12


def summary(prepared: PreparedSet) -> str:
    """Counts of the set, and a table of the reasons for which records were quarantined, with an example each."""
    manifest = prepared.manifest
    text_only = int((prepared.length_key < 0).sum())
    lines = [
        f"{len(prepared):,} of {manifest['records']:,} records usable ({text_only:,} text-only): {int(prepared.n_tokens.sum()):,} tokens, "
        f"{int(prepared.n_supervised.sum()):,} supervised; {manifest['truncated']:,} cut at {manifest['max_tokens']} tokens"
    ]
    if manifest.get("images_cut"):
        lines.append(f"{manifest['images_cut']:,} of those that were cut lost a picture, or a part of one")
    if manifest["answers_left_out"]:
        lines.append(f"{manifest['answers_left_out']:,} answers are left out of the loss, as their turns say")
    if manifest["other_keys"]:
        lines.append(f"keys that mean nothing here: {_keys(manifest['other_keys'])}")
    if manifest["turned"]:
        lines.append(
            f"{manifest['turned']:,} records show a picture that its EXIF orientation would turn or mirror; it is used as it is stored, "
            "as the original does: rotate the files themselves where that matters"
        )
    if manifest["quarantined"]:
        lines += [_table(prepared), *_examples(prepared), f"every one of them: {prepared.folder / QUARANTINE}"]
    return "\n".join(lines)


def refuse(prepared: PreparedSet, max_share: float) -> None:
    """Raises UserError when the set is empty, or its quarantined records are a larger share than `max_share`."""
    manifest = prepared.manifest
    records, quarantined = manifest["records"], manifest["quarantined"]
    if not records:
        raise UserError(f"data.records: {manifest['where']['records']} holds no record; give a file of LLaVA records")
    counted = ", ".join(f"{reason} {count:,}" for reason, count in manifest["reasons"].items())
    listed = f"({counted}), listed in {prepared.folder / QUARANTINE}"
    if not len(prepared):
        raise UserError(f"data.records: none of the {records:,} records is usable {listed}; mend them")
    if quarantined > max_share * records:
        share = f"{quarantined / records:.2%}"
        raise UserError(
            f"data.max_quarantined_share: {quarantined:,} of {records:,} records ({share}) are bad {listed}, and {max_share:.2%} may be; "
            f"mend them, or write data.max_quarantined_share={_round_up(quarantined / records)}"
        )


def _table(prepared: PreparedSet) -> str:
    manifest = prepared.manifest
    table = Table("reason", "records", "share", "what it means", title="quarantined records")
    for reason, count in _by_number(manifest["reasons"]):
        table.add_row(reason, f"{count:,}", f"{count / manifest['records']:.2%}", REASONS[reason])
    out = io.StringIO()
    Console(file=out, width=120, highlight=False, markup=False, emoji=False).print(table)
    return out.getvalue().rstrip("\n")


def _examples(prepared: PreparedSet) -> list[str]:
    """The first record of each reason, a line each: whole, so that a path in it can be copied."""
    reasons = prepared.manifest["reasons"]
    examples: dict[str, str] = {}
    with (prepared.folder / QUARANTINE).open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            if entry["reason"] not in examples:
                words = f"first {entry['reason']}: line {entry['line']}, id {entry['id']}: {entry['detail']}"
                examples[entry["reason"]] = printable(words).replace("\n", "\\n").replace("\t", "\\t")
            if len(examples) == len(reasons):
                break
    return [examples[reason] for reason, _ in _by_number(reasons)]


def _keys(counts: dict[str, int]) -> str:
    """The most frequent, with their numbers, and how many there are besides."""
    listed = [f"{key} ({count:,})" for key, count in _by_number(counts)[:_MOST_KEYS]]
    rest = f" and {len(counts) - _MOST_KEYS:,} more" if len(counts) > _MOST_KEYS else ""
    return ", ".join(listed) + rest


def _by_number(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda item: -item[1])


def _round_up(share: float) -> str:
    """A share just above, to write into a config."""
    return f"{min(1.0, share + 0.0001):.4f}"
