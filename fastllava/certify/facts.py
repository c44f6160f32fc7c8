"""What a certificate says of the run it is about: model, data, samples, settings, machine, versions, and hashes of them."""

import hashlib
import json
from typing import Any

import torch

from fastllava.certify.selection import Part
from fastllava.config import LEVER, Config, as_written, marked, value_of
from fastllava.data.plan import Plan
from fastllava.data.prepared import PreparedSet
from fastllava.model.llava import Llava
from fastllava.model.quantised import count
from fastllava.train.metrics.summary import commit_in_words, versions
from fastllava.train.stages import trained_parts


def of_step(part: Part, plan: Plan, prepared: PreparedSet) -> dict[str, Any]:
    """What was taken of a step of `plan`; JSON."""
    samples, lengths = part.step.samples, plan.lengths
    return {
        "step": part.step.index,
        "samples": len(samples),
        "of": part.whole,
        "from": part.start,
        "ids": [prepared.row(int(i)).id for i in samples],
        "tokens": int(lengths.n_tokens[samples].sum()),
        "supervised": int(lengths.n_supervised[samples].sum()),
        "images": int(lengths.n_images[samples].sum()),
        "micro_batches": len(part.step.micro_batches),
    }


def of_run(
    config: Config, base: Llava, prepared: PreparedSet, truth: str, padded_batch: int, device: torch.device, drew: bool = False
) -> dict[str, Any]:
    """What identifies the run and the machine; JSON. `base` is the model as read, but for each B of new adapters where those were drawn."""
    trained = sum(weight.numel() for part in trained_parts(base, config.stage) for weight in part.parameters())
    train = config.train
    return {
        "stage": config.stage,
        "device": str(device),
        "precision": train.precision,
        "truth": truth,
        "padded_batch": padded_batch,
        "settings": {
            key: getattr(train, key)
            for key in ("loss_norm", "micro_batch_tokens", "recompute", "last_layer", "compile", "tf32", "global_batch", "seed")
        }
        | {key: value_of(config, key) for key, _ in marked(LEVER)},
        "lora": _lora(config, drew),
        "kernels": {room: use["implementation"] for room, use in base.kernels().items()},
        "model": {
            "llm": str(config.model.llm),
            "vision_tower": str(base.origin.tower_folder or config.model.llm),
            "projector": base.projector_source,
            "trained": trained,
            "frozen": count(base) - trained,
            "weights_sha256": _sha256_of(base),
        },
        "data": {
            "records": str(config.data.records),
            "prepared_digest": prepared.digest,
            "samples": len(prepared),
            "quarantined": prepared.manifest["quarantined"],
        },
        "config": as_written(config),
        "config_sha256": hashlib.sha256(json.dumps(as_written(config), sort_keys=True).encode()).hexdigest(),
        "versions": versions(),
        "commit": commit_in_words(),
    }


def _lora(config: Config, drew: bool) -> str | None:
    """The adapters in words; None where there are none. `drew`: their B were drawn."""
    lora = config.lora
    if not lora.wanted:
        return None
    said = f"rank {lora.rank}, alpha {lora.scale * (lora.rank or 0):g}, on {', '.join(lora.targets)}; "
    drops = f"{lora.dropped:.6g} of its input dropped, by seed, step, sample, place in it, layer and column alone: every way saw the same"
    begun = "; B, which begins as zeros, is drawn here, so that A has a gradient" if drew else ""
    return said + (drops if lora.draws else "nothing dropped") + begun


def _sha256_of(model: Llava) -> str:
    """One hash of all weights as they were read, in the order of their names."""
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
