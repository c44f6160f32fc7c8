"""Whether a run may go on from what its output_dir holds: one process at a time, the same training, nothing guessed."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastllava import checkpoint
from fastllava.config import Config, as_written, same_training
from fastllava.errors import UserError
from fastllava.masking import masked_values
from fastllava.summary import SUMMARY_FILE

# A change here leaves every bit of the result as it was, or is covered by the prepared set's digest.
_FREE = {
    "output_dir",
    "log",
    "data.records",
    "data.images",
    "data.prepared_dir",
    "data.workers",
    "train.checkpoint_steps",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.watchdog_seconds",
}
# A change here is the same training in another order of additions: allowed, and said.
_ROUNDING = {"kernels", *(key for key, _ in same_training())}


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold `output_dir` for this process. Raises UserError when another run holds it."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written ({error.strerror}); give a folder that can") from None
    with file:
        try:
            # lockf, not flock: data workers would inherit the latter and hold it for seconds after this process was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"output_dir: another run is writing to {output_dir}; wait for it or give another folder") from None
        yield


def completed(config: Config, prepared_digest: str) -> dict[str, Any] | None:
    """The summary of this very run when output_dir holds it, finished. Raises UserError when it holds another one, finished."""
    path = config.output_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_bytes())
        if summary["status"] != "complete":
            return None
        then, digest_then = dict(summary["config"]), str(summary["prepared_digest"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{path}: is not a summary that a run wrote; remove it to go on with the run, or give another output_dir") from None
    _check_same(config, then, prepared_digest, digest_then, lambda _: None)
    return summary


def find_checkpoint(config: Config, prepared_digest: str, report: Any) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, or None to begin at step 0. Raises UserError when it belongs to another training."""
    found = checkpoint.newest(config.output_dir, report)
    if found is not None:
        _check_same(config, as_written(found.config), prepared_digest, found.prepared_digest, report)
    return found


def _check_same(config: Config, then: dict[str, Any], prepared_digest: str, digest_then: str, report: Any) -> None:
    now_flat, then_flat = _flat(as_written(config)), _flat(masked_values(then))
    changed = [k for k in sorted(now_flat.keys() | then_flat.keys()) if now_flat.get(k) != then_flat.get(k) and not _in(k, _FREE)]
    described = {k: f"{k} was {then_flat.get(k)} and is now {now_flat.get(k)}" for k in changed}
    refused = [text for key, text in described.items() if not _in(key, _ROUNDING)]
    if prepared_digest != digest_then and not any(key.startswith("data.") for key in changed):
        refused.append("data.records: the prepared data is not the same as then (records, tokenizer, images or template changed)")
    if refused:
        raise UserError(
            f"output_dir: {config.output_dir} holds a run of another training: {'; '.join(refused)}; "
            "change that back or give another output_dir"
        )
    for text in described.values():
        report(f"resumed with a change that alters rounding only: {text}")


def _in(key: str, names: set[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
