"""Checkpoints of a run: written beside, hashed, renamed; verified before anything is read.

`output_dir/checkpoint-N/` is the state before step N:

    tensors/          trained weights and AdamW's moments, through torch.distributed.checkpoint
    state.json        step, digest of the prepared set, loss and norm of the last steps, versions; JSON, never pickle
    run_config.json   the run's configuration
    manifest.json     size and SHA-256 of every other file; written last

The schedule, and whatever a training step draws at random, are functions of the step's number, so there is no random or scheduler
state to keep.
"""

import shutil
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastllava import __version__
from fastllava.config import Config, as_written, check_config
from fastllava.disk import described, read_json_object, sync, write_json
from fastllava.errors import UserError
from fastllava.parallel import ALONE, Processes
from fastllava.shards import read_shards, read_weights, write_shards
from fastllava.spikes import checked, recent

RUN_CONFIG = "run_config.json"
_STATE, _MANIFEST, _TENSORS = "state.json", "manifest.json", "tensors"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path
    step: int
    """The step that comes next."""
    prepared_digest: str
    config: Config
    recent: Sequence[Sequence[float]] = ()
    """Loss and gradient norm of the last steps (`fastllava.spikes`)."""


def save(
    output_dir: Path,
    step: int,
    config: Config,
    prepared_digest: str,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    processes: Processes = ALONE,
) -> Path:
    """Write `output_dir/checkpoint-{step}` and return it. Raises OSError, leaving older checkpoints as they were.

    All `processes` of a run call this together and write their shards of the tensors; what is written does not depend on
    how many they are, and any other number can read it. When one fails, all raise.
    """
    final = output_dir / f"checkpoint-{step}"
    beside = output_dir / f".checkpoint-{step}.partial"
    try:
        processes.on_first(lambda: _make_anew(beside))
        write_shards(_tensors(trained, optimizer), beside / _TENSORS, processes)
        hashed = processes.gather(lambda: _shards_of(beside / _TENSORS, processes.rank))
        processes.on_first(lambda: _complete(beside, final, step, config, prepared_digest, hashed, recent(optimizer).rows()))
    except OSError:
        if processes.first:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    return final


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(
    beside: Path,
    final: Path,
    step: int,
    config: Config,
    prepared_digest: str,
    hashed: Sequence[dict[str, dict[str, Any]]],
    rows: list[list[float]],
) -> None:
    """Write what is not tensors, the manifest last, and give the folder its name."""
    versions = {"fastllava": __version__, "torch": torch.__version__}
    state = {"step": step, "prepared_digest": prepared_digest, "processes": len(hashed), "recent": rows}
    write_json(beside / _STATE, {**state, **versions})
    write_json(beside / RUN_CONFIG, as_written(config))
    shards = {name: entry for part in hashed for name, entry in part.items()}
    write_json(beside / _MANIFEST, {**_contents(beside, but=shards), **shards})
    sync(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    sync(final.parent)


def keep_last(output_dir: Path, count: int) -> None:
    """Remove all but the `count` newest complete checkpoints, and what interrupted saves left."""
    for partial in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for folder in _folders(output_dir)[:-count]:
        # The manifest goes first: a folder that is half removed must not look complete.
        (folder / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def newest(output_dir: Path, report: Any = print) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None when there is none; damaged ones are reported and passed over.

    Raises UserError when there are checkpoints and every one is damaged: starting anew in silence would lose the run.
    """
    folders = _folders(output_dir)
    for folder in reversed(folders):
        try:
            return verify(folder)
        except UserError as error:
            report(f"passed over: {error}")
    if folders:
        raise UserError(f"output_dir: every checkpoint in {output_dir} is damaged; remove its checkpoint-* folders to start anew")
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
        rows = checked(state.get("recent", []))
        config = check_config(read_json_object(folder / RUN_CONFIG))
    except (OSError, ValueError, KeyError, UserError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: holds a state that this version does not read ({reason}); {remedy}") from None
    return Checkpoint(folder, step, digest, config, rows)


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


def _folders(output_dir: Path) -> list[Path]:
    """Checkpoint folders with a manifest, oldest first. One without was never finished and does not count."""
    numbered = []
    for folder in output_dir.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and (folder / _MANIFEST).is_file():
            numbered.append((int(number), folder))
    return [folder for _, folder in sorted(numbered)]


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
