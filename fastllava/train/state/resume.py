"""Whether a run may go on from what its output_dir holds: one process at a time, the same training, nothing guessed."""

import fcntl
import os
import struct
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllava.config import Config, as_written, check_config, same_training
from fastllava.console.masking import masked_values
from fastllava.disk import held_alone, read_json_object
from fastllava.errors import UserError
from fastllava.model.weights.adapter_config import ADAPTER_CONFIG
from fastllava.model.weights.adapters import ADAPTER_WEIGHTS
from fastllava.train.metrics.log import METRICS_FILE, read_metrics
from fastllava.train.metrics.summary import SUMMARY_FILE, damage
from fastllava.train.state.checkpoint import PROGRESS, RUN_CONFIG, Checkpoint, newest
from fastllava.train.state.fingerprint import KEYS, Fingerprint, differences

Report = Callable[[str], object]

# A change here leaves every bit of the result as it was, or is covered by the prepared set's digest.
_FREE = {
    "output_dir",
    "log",
    "data.records",
    "data.images",
    "data.prepared_dir",
    "data.workers",
    "data.max_quarantined_share",
    "model.tokenizer",
    "train.checkpoint_steps",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.watchdog_seconds",
    "eval.every_steps",
    "eval.samples",
    "eval.max_new_tokens",
}
_HELD_OUT = "eval.held_out"
# A change here is covered by the fingerprint of what the run began with.
PLACES = frozenset(KEYS.values())
# A change here is the same training in another order of additions: allowed, and said.
_ROUNDING = {"kernels", *(key for key, _ in same_training())}
_WRITTEN = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WRITTEN += ("mm_projector.safetensors", "mm_projector.bin", ADAPTER_CONFIG, *ADAPTER_WEIGHTS, METRICS_FILE)
"""What a run, or somebody else, leaves in output_dir and a new run would write over."""


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold `output_dir` for this process. Raises UserError when another run holds it."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written ({error.strerror}); give a folder that can") from None
    with file:
        if not held_alone(file):
            raise UserError(f"output_dir: another run is writing to {output_dir}; wait for it or give another folder")
        yield


def is_held(output_dir: Path) -> bool:
    """Whether another process of this machine, or of another one with the same file system, holds `output_dir`; nothing is waited for."""
    if sys.platform != "linux":
        return False
    try:
        with (output_dir / ".lock").open("rb") as file:
            # Asks, and takes nothing: a run that begins at this moment must not find it locked. The fields of C's struct flock.
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
    except OSError:
        return False
    return kind != fcntl.F_UNLCK


@dataclass(frozen=True)
class Held:
    """What `output_dir` holds of a run, and what the run carries from one process to the next."""

    run: str
    """Its name, the same from its first step to its last."""
    start: Fingerprint
    """The model it began with."""
    checkpoint: Checkpoint | None = None
    """To go on from; None to begin at step 0."""
    summary: Mapping[str, Any] | None = None
    """The summary of the finished run, when there is nothing left to do."""
    notes: tuple[str, ...] = ()
    """What was found damaged, and what was done about it."""


def look(config: Config, prepared_digest: str, start: Fingerprint, report: Report) -> Held:
    """What the training of `config`, on that data, from a model of that fingerprint finds in output_dir.

    Raises UserError when it belongs to another training, and when it looks like a run that cannot be gone on with.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        report(text)

    broken = None
    if (summary := _completed(config, prepared_digest, start)) is not None:
        broken = damage(config.output_dir, summary)
        if broken is None:
            return Held(str(summary.get("run", "")), start, summary=summary)
        note(f"{config.output_dir} holds this run, complete, but its {broken}: going on from a checkpoint to write the result again")
    found = newest(config.output_dir, note)
    if found is None:
        _check_nothing_is_lost(config, broken, report)
        return Held(_new_name(), start, notes=tuple(notes))
    _check_same(config, as_written(found.config), prepared_digest, found.prepared_digest, start, found.start, report)
    return Held(found.run or _new_name(), start, found, notes=tuple(notes))


def _new_name() -> str:
    return uuid.uuid4().hex[:12]


def _completed(config: Config, prepared_digest: str, start: Fingerprint) -> dict[str, Any] | None:
    """The summary of this very run when output_dir holds it, finished. Raises UserError when it holds another one, finished."""
    path = config.output_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = read_json_object(path)
        if summary["status"] != "complete":
            return None
        then, digest_then, start_then = dict(summary["config"]), str(summary["prepared_digest"]), dict(summary.get("start") or {})
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{path}: is not a summary that a run wrote; remove it to go on with the run, or give another output_dir") from None
    _check_same(config, then, prepared_digest, digest_then, start, start_then, lambda _: None)
    return summary


def _check_nothing_is_lost(config: Config, broken: str | None, report: Report) -> None:
    """Raises UserError when output_dir, which holds no checkpoint, holds what a run that begins at step 0 would write over."""
    out, other = config.output_dir, "bring back what is gone from a copy, or give another output_dir"
    if broken is not None:
        raise UserError(
            f"output_dir: {out} holds this run, complete, but its {broken}, and no checkpoint is left to write it from; {other}"
        )
    if (out / PROGRESS).exists():
        raise UserError(
            f"output_dir: {out} holds a run that had come to step {_step_reached(out)}, and its checkpoints are gone; {other}, "
            f"or remove {PROGRESS} there to begin anew"
        )
    written = [name for name in _WRITTEN if (out / name).exists()]
    if not written:
        return
    try:
        then = read_json_object(out / RUN_CONFIG)
    except (OSError, ValueError):
        raise UserError(
            f"output_dir: {out} holds {', '.join(written)} and no {RUN_CONFIG} of a run that wrote them; give a new folder, or an empty one"
        ) from None
    _check_same(config, then, "", "", {}, {}, report)
    if rows := read_metrics(out):
        report(f"the run had not come to its first checkpoint: the {len(rows)} steps in {METRICS_FILE} are taken again")


def _step_reached(output_dir: Path) -> Any:
    try:
        return int(read_json_object(output_dir / PROGRESS)["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return "some number"


def _check_same(
    config: Config,
    then: Mapping[str, Any],
    prepared_digest: str,
    digest_then: str,
    start: Fingerprint,
    start_then: Mapping[str, Any],
    report: Report,
) -> None:
    now_flat, then_flat = _flat(as_written(config)), _flat(_with_defaults(then))
    free = _FREE | (PLACES if start_then else set())
    changed = [k for k in sorted(now_flat.keys() | then_flat.keys()) if now_flat.get(k) != then_flat.get(k)]
    described = {k: f"{k} was {_short(then_flat.get(k))} and is now {_short(now_flat.get(k))}" for k in changed}
    if not any(isinstance(flat.get(_HELD_OUT), float) for flat in (now_flat, then_flat)):
        # Only a share of the records takes samples out of the training.
        free = free | {_HELD_OUT}
    refused = [text for key, text in described.items() if not _in(key, free | _ROUNDING)]
    refused += [text + (f" ({described[key]})" if key in described else "") for key, text in differences(start, start_then).items()]
    if prepared_digest != digest_then and not any(key.startswith("data.") and not _in(key, free) for key in changed):
        refused.append("data.records: the prepared data is not the same as then (records, tokenizer, images or template changed)")
    if refused:
        raise UserError(
            f"output_dir: {config.output_dir} holds a run of another training: {'; '.join(refused)}; "
            "change that back or give another output_dir"
        )
    for key, text in described.items():
        if _in(key, _ROUNDING):
            report(f"resumed with a change that alters rounding only: {text}")
        elif _in(key, PLACES) and start_then:
            report(f"{text}: the same model in another place")
    if start and not start_then:
        report("note: it was written by a version that kept no hashes of weights, so whether model.* is the same model cannot be told")


def _with_defaults(then: Mapping[str, Any]) -> Mapping[str, Any]:
    """A written config with the keys that have come since; as it is where this version does not take it."""
    try:
        return as_written(check_config(then))
    except UserError:
        return masked_values(dict(then))


def changes_nothing(key: str) -> bool:
    """Whether another value of `key` leaves every bit of the result as it is, the data and the model being the same."""
    return _in(key, _FREE)


def changes_rounding(key: str) -> bool:
    """Whether another value of `key` is the same training in another order of additions."""
    return _in(key, _ROUNDING)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _in(key: str, names: Set[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
