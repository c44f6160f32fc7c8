"""Checkpoints of a run: written beside, hashed, renamed; verified before anything is read.

`output_dir/checkpoint-N/` is the state before step N:

    tensors/          trained weights and AdamW's moments, through torch.distributed.checkpoint
    state.json        step, digest of the prepared set, which run, what model it began with, samples set aside, loss and norm of the last
                      steps, versions; JSON, never pickle
    run_config.json   the run's configuration
    manifest.json     size and SHA-256 of every other file; written last

The schedule, and whatever a training step draws at random, are functions of the step's number, so there is no random or scheduler
state to keep.

`output_dir/progress.json` says that checkpoints have been written, so that a run whose checkpoints are gone does not begin anew.
"""

import contextlib
import re
import shutil
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastllava import __version__
from fastllava.config import Config, as_written, check_config
from fastllava.disk import described, read_json_object, sync, write_json, writing
from fastllava.distributed.processes import ALONE, Processes
from fastllava.errors import UserError
from fastllava.optim.spikes import checked, recent
from fastllava.train.metrics.summary import SUMMARY_FILE
from fastllava.train.state.shards import read_shards, read_weights, write_shards

RUN_CONFIG = "run_config.json"
PROGRESS = "progress.json"
_STATE, _MANIFEST, _TENSORS = "state.json", "manifest.json", "tensors"
_OURS = re.compile(r"state\.json|run_config\.json|tensors/(\.metadata(\.tmp)?|__\d+_\d+\.distcp)")
"""What a checkpoint holds besides its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    step: int
    """The step that comes next."""
    prepared_digest: str
    config: Config
    recent: Sequence[Sequence[float]] = ()
    """Loss and gradient norm of the last steps (`fastllava.optim.spikes`)."""
    run: str = ""
    """Which run wrote it; a run keeps that name when it is resumed. Empty in old checkpoints, as is `start`."""
    start: Mapping[str, Any] = field(default_factory=dict)
    """What model the run began with (`fastllava.train.state.fingerprint`)."""
    set_aside: Mapping[int, int] = field(default_factory=dict)
    """The step from which on a sample is left out, by its number in the prepared set."""
    passed_over: tuple[str, ...] = ()
    """Names of newer folders that are damaged."""


def save(
    output_dir: Path,
    step: int,
    config: Config,
    prepared_digest: str,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    processes: Processes = ALONE,
    *,
    run: str = "",
    start: Mapping[str, Any] | None = None,
    set_aside: Mapping[int, int] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-{step}` and return it. Raises OSError, leaving older checkpoints as they were.

    All `processes` of a run call this together and write their shards of the tensors; what is written does not depend on
    how many they are, and any other number can read it. When one fails, all raise. `run`, `start` and `set_aside` are `Checkpoint`'s.
    """
    final = output_dir / f"checkpoint-{step}"
    beside = output_dir / f".checkpoint-{step}.partial"
    tensors = _tensors(trained, optimizer)
    state = {"step": step, "prepared_digest": prepared_digest, "processes": processes.world, "run": run, "start": dict(start or {})}
    state["set_aside"] = sorted((set_aside or {}).items())
    with writing(output_dir, sum(tensor.nbytes for tensor in tensors.values())):
        try:
            with processes.together():
                if processes.first:
                    _make_anew(beside)
            write_shards(tensors, beside / _TENSORS, processes)
            with processes.together():
                mine = _shards_of(beside / _TENSORS, processes.rank)
            hashed = processes.gather(mine)
            with processes.together():
                if processes.first:
                    _complete(beside, final, config, {**state, "recent": recent(optimizer).rows()}, hashed)
        except OSError:
            if processes.first:
                shutil.rmtree(beside, ignore_errors=True)
            raise
    return final


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(beside: Path, final: Path, config: Config, state: dict[str, Any], hashed: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Write what is not tensors, the manifest last, and give the folder its name."""
    write_json(beside / _STATE, {**state, "fastllava": __version__, "torch": torch.__version__})
    write_json(beside / RUN_CONFIG, as_written(config))
    shards = {name: entry for part in hashed for name, entry in part.items()}
    write_json(beside / _MANIFEST, {**_contents(beside, but=shards), **shards})
    sync(beside)
    remove(final)
    beside.rename(final)
    sync(final.parent)
    with contextlib.suppress(OSError):  # the checkpoint is there; this only guards against its loss
        write_json(final.parent / PROGRESS, {"step": state["step"], "run": state["run"]})


def keep_last(output_dir: Path, count: int, written: Path | None = None, damaged: Collection[str] = ()) -> None:
    """Remove all but the `count` newest checkpoints, and what interrupted saves and removals left.

    Only whole ones of the run that wrote `written`, the newest, count and go, and none is newer than that; folders named in
    `damaged` do not count. Whatever else lies there stays.
    """
    for left in (*output_dir.glob(".checkpoint-*.partial"), *output_dir.glob(".checkpoint-*.removing")):
        shutil.rmtree(left, ignore_errors=True)
    whole = {folder: run for folder in _folders(output_dir) if folder.name not in damaged and (run := _run_if_whole(folder)) is not None}
    written = written or next(reversed(whole), None)
    if written is None:
        return
    newest_step, this_run = _step(written), whole.get(written, "")
    ours = [folder for folder, run in whole.items() if _step(folder) <= newest_step and ("" in (run, this_run) or run == this_run)]
    for folder in ours[:-count]:
        remove(folder)
    for folder in _numbered(output_dir):
        if _step(folder) < newest_step and _is_half_removed(folder):
            remove(folder)


def remove(folder: Path) -> None:
    """Take a checkpoint away. Killed on the way, it leaves the whole checkpoint or a hidden folder that the next save clears."""
    aside = folder.with_name(f".{folder.name}.removing")
    with contextlib.suppress(OSError):  # what cannot be removed stays, and counts as it did
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        aside.unlink() if aside.is_symlink() else shutil.rmtree(aside, ignore_errors=True)


def newest(output_dir: Path, report: Any = print) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None when there is none; damaged ones are reported and passed over.

    Raises UserError when there are checkpoints and none is whole: starting anew in silence would lose the run.
    """
    passed_over: list[str] = []
    reason = ""
    for folder in reversed(_numbered(output_dir)):
        try:
            found = verify(folder)
        except UserError as error:
            reason = reason or str(error).rpartition(";")[0]
            report(f"passed over: {error}")
            passed_over.append(folder.name)
            continue
        if passed_over:
            names = ", ".join(passed_over)
            report(f"going on from {found.folder.name}, as {names} cannot be used: the steps from {found.step} on are taken again")
        return replace(found, passed_over=tuple(passed_over))
    if passed_over:
        raise UserError(
            f"output_dir: every checkpoint in {output_dir} is damaged ({reason}); bring one back from a copy, or give another output_dir, "
            f"or remove its checkpoint-* folders and its {PROGRESS} to start anew"
        )
    return None


def begun_with(output_dir: Path) -> str | None:
    """Digest of the prepared set of the run in `output_dir`, by its newest readable checkpoint or its summary; nothing is verified."""
    for path in (*(folder / _STATE for folder in reversed(_numbered(output_dir))), output_dir / SUMMARY_FILE):
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(read_json_object(path)["prepared_digest"])
    return None


def verify(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. Raises UserError that names the damaged file."""
    remedy = "use an older checkpoint or remove the folder"
    try:
        manifest = read_json_object(folder / _MANIFEST)
        found = _contents(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: is no complete checkpoint ({error}); {remedy}") from None
    for name in sorted(manifest.keys() | found.keys()):
        if manifest.get(name) != found.get(name):
            what = "is missing" if name not in found else "was added or changed after it was written"
            raise UserError(f"{folder}: file {name} {what}; {remedy}")
    try:
        state = read_json_object(folder / _STATE)
        step, digest = state["step"], state["prepared_digest"]
        if type(step) is not int or step < 0 or type(digest) is not str:
            raise ValueError(f"step {step!r}, prepared_digest {digest!r}")
        rows, run, start = checked(state.get("recent", [])), state.get("run", ""), state.get("start", {})
        if type(run) is not str or type(start) is not dict:
            raise ValueError(f"run {run!r}, start of type {type(start).__name__}")
        aside = dict(state.get("set_aside", []))
        if not all(type(number) is int and number >= 0 for pair in aside.items() for number in pair):
            raise ValueError("set_aside holds more than numbers")
        config = check_config(read_json_object(folder / RUN_CONFIG))
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: holds a state that this version does not read ({reason}); {remedy}") from None
    return Checkpoint(folder, step, digest, config, rows, run, start, aside)


def restore(
    checkpoint: Checkpoint, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, processes: Processes = ALONE
) -> None:
    """Load a verified checkpoint into the trained parameters and their optimizer, in place; all `processes` together."""
    with torch.no_grad():
        read_shards(_tensors(trained, optimizer), checkpoint.folder / _TENSORS, processes)
    recent(optimizer).fill(checkpoint.recent)


def read_model(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and trained weights (internal names, as stored) of `checkpoint-N`, verified first."""
    checkpoint = verify(folder)
    return checkpoint.config, read_weights(folder / _TENSORS, "weight/")


def _tensors(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flat names, so that a checkpoint can be read by name without this code's classes."""
    flat = {f"weight/{name}": parameter.detach() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            flat[f"{key}/{name}"] = value
    return flat


def _numbered(output_dir: Path) -> list[Path]:
    """Folders named as checkpoints are, oldest first."""
    return sorted((folder for folder in output_dir.glob("checkpoint-*") if _step(folder) >= 0 and folder.is_dir()), key=_step)


def _folders(output_dir: Path) -> list[Path]:
    """Those with a manifest."""
    return [folder for folder in _numbered(output_dir) if (folder / _MANIFEST).is_file()]


def _step(folder: Path) -> int:
    """The step in a checkpoint's name; -1 when it is no such name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() and len(number) < 16 else -1


def _run_if_whole(folder: Path) -> str | None:
    """The run that wrote a checkpoint whose files all have their size, "" for an old one; None when one is not whole."""
    try:
        manifest = read_json_object(folder / _MANIFEST)
        sizes = {name: (folder / name).lstat().st_size for name in manifest}
        if any(entry["bytes"] != sizes[name] for name, entry in manifest.items()):
            return None
        return str(read_json_object(folder / _STATE).get("run", ""))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_half_removed(folder: Path) -> bool:
    """Whether it holds what a checkpoint does, as far as it goes, and no manifest: so did older versions remove one."""
    try:
        return not (folder / _MANIFEST).exists() and all(map(_OURS.fullmatch, _names(folder)))
    except (OSError, ValueError):
        return False


def _contents(folder: Path, but: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Size and hash of every file in `folder` apart from the manifest and those named in `but`. Raises ValueError for what is no file."""
    return {name: described(folder / name) for name in _names(folder) if name != _MANIFEST and name not in but}


def _names(folder: Path) -> list[str]:
    """The files below `folder`, which leads nowhere else. Raises ValueError for links, pipes and devices."""
    found = []
    for path in sorted(folder.rglob("*")):
        mode, name = path.lstat().st_mode, path.relative_to(folder).as_posix()
        if stat.S_ISREG(mode):
            found.append(name)
        elif not stat.S_ISDIR(mode):
            raise ValueError(f"{name} is a {'symbolic link' if stat.S_ISLNK(mode) else 'pipe or device'}, no file")
    return found


def _shards_of(tensors: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and hash of the files that process `rank` wrote: each hashes its own, as they are large."""
    return {f"{_TENSORS}/{path.name}": described(path) for path in sorted(tensors.glob(f"__{rank}_*"))}
