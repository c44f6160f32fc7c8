"""What model a training starts from, so that another one in its place is told from the same one in another place.

Weights count by content under their internal names, in the dtype they were read in, and so does what a config.json says of the
computation: the same model in other files, cut otherwise or elsewhere, has the same fingerprint.

Costs a pass of SHA-256 over the weights in memory: 13.5 GB of a 7B in bf16 take 7 s of one core that does 2 GB/s, shared by the
threads of the processes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from torch import Tensor

from fastllava.distributed.processes import ALONE, Processes
from fastllava.model.hashes import hashed
from fastllava.model.llava import Llava
from fastllava.model.lora import is_adapter
from fastllava.model.quantised import Nf4Weight, weights_by_name

Fingerprint = dict[str, dict[str, Any]]
"""By config key (`KEYS`): `weights`, a hash or "drawn", and `config`, what decides the computation. Plain JSON."""

KEYS = {"llm": "model.llm", "tower": "model.vision_tower", "projector": "model.projector"}
_DRAWN = "drawn"
"""The weights of what is drawn from the seed, which the config holds."""
_MOST_THREADS = 8


def fingerprint(model: Llava, processes: Processes = ALONE, *, before: Mapping[str, str] | None = None) -> Fingerprint:
    """The fingerprint of a model as `load_llava` gives it, on the CPU; all `processes` together, each hashing its share.

    before: hashes (`hashed`) of weights as they were read, by our name, where adapters have been merged into them since.
    """
    spec = {"mean": model.spec.mean, "std": model.spec.std}
    configs = {
        "llm": asdict(model.llm.config),
        "tower": {**asdict(model.tower.config), **spec},
        "projector": {"projector_type": model.projector.projector_type},
    }
    drawn = model.projector_source == "fresh"
    # Adapters are drawn anew in every run, or come with their own key.
    tensors = {
        name: tensor
        for name, tensor in sorted(weights_by_name(model).items())
        if not (drawn and name.startswith("projector.")) and not is_adapter(name)
    }
    mine = list(tensors)[processes.rank :: processes.world]
    with processes.together(), ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        hashes = dict(zip(mine, threads.map(_hashed, (tensors[name] for name in mine)), strict=True))
    hashes = {name: value for part in processes.gather(hashes) for name, value in part.items()} | dict(before or {})
    weights = {part: _together({name: hashes[name] for name in tensors if name.startswith(f"{part}.")}) for part in KEYS}
    if drawn:
        weights["projector"] = _DRAWN
    # As it will be read again.
    return json.loads(json.dumps({key: {"weights": weights[part], "config": configs[part]} for part, key in KEYS.items()}))


def differences(now: Fingerprint, then: Mapping[str, Any]) -> dict[str, str]:
    """What is not as it was, in words, by config key. Of `then`, only what both know counts: another version may say more or less."""
    found: dict[str, str] = {}
    for key, part in now.items():
        was = then.get(key)
        if not isinstance(was, dict) or not isinstance(was.get("config"), dict):
            continue
        before, after = was["config"], part["config"]
        names = [name for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]
        changed = [f"its {name} was {str(before[name])[:100]} and is now {after[name]}" for name in names]
        if "weights" in was and was["weights"] != part["weights"]:
            changed.insert(0, "its weights are not those that the run began with")
        if changed:
            found[key] = f"{key}: {', '.join(changed)}"
    return found


def _hashed(weight: Tensor | Nf4Weight) -> str:
    """The hash of a weight as it was read; one that was quantised has kept it."""
    if not isinstance(weight, Nf4Weight):
        return hashed(weight)
    if weight.digest is None:
        raise RuntimeError("a quantised weight that was never read has no fingerprint")
    return weight.digest


def _together(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in hashes.items()).encode()).hexdigest()
