"""The certificate of a run from its config: the samples, every variant of every step, the verdict, the two files."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastllava.accounting import Accounting
from fastllava.certify.judge import Figures, judge, measure
from fastllava.certify.page import Certificate, as_json, lines
from fastllava.certify.selection import Part, Selection, choose
from fastllava.certify.variants import TRUTH, VARIANTS, Contents, Variants
from fastllava.config import Config
from fastllava.data.loader import read_sample, steps
from fastllava.data.plan import Plan
from fastllava.data.prepared import PreparedSet
from fastllava.errors import UserError
from fastllava.model.llava import Llava
from fastllava.model.weights import load_llava
from fastllava.parallel import ALONE
from fastllava.stages import COMPUTE_DTYPE, trained_parts
from fastllava.startup import Say, prepare_data
from fastllava.summary import versions
from fastllava.train import check_run

TRUTHS = {"fp32": torch.float32, "fp64": torch.float64}
TEXT, JSON = "certificate.txt", "certificate.json"


def certify(
    config: Config,
    say: Say,
    *,
    n_steps: int = 2,
    n_samples: int = 16,
    padded_batch: int = 2,
    truth: str | None = None,
    out: Path | None = None,
) -> Certificate:
    """Compute some samples of some steps of the run in every way, and write certificate.txt and .json to `out` or output_dir.

    `n_samples` 0 takes whole steps. `truth`: fp64 or fp32; when None fp64 on a CPU and for a run in fp32, else fp32. Raises UserError
    for whatever the user can mend, as training does.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("certify: it runs in one process, and torchrun starts several; start it without torchrun")
    device, ops = check_run(config, ALONE)
    folder = _folder(config, out)
    _, spec, prepared = prepare_data(config, say)
    plan = Plan(prepared, config.data, config.train, Accounting.of(config).cost())
    parts = choose(plan, n_steps, n_samples, config.train.seed)
    base = load_llava(config.model, ops, COMPUTE_DTYPE[config.train.precision], config.train.seed)
    if truth is None:
        truth = "fp64" if device.type == "cpu" or config.train.precision == "fp32" else "fp32"
    variants = Variants(config, base, device, TRUTHS[truth], padded_batch)
    rows, figures, judged = [], [], []
    loaded = steps(Selection(tuple(part.step for part in parts)), 0, prepared, spec, config.data, pin=device.type == "cuda")
    for part, (step, packed) in zip(parts, loaded, strict=True):
        samples = [read_sample(prepared, spec, config.data, int(i), float(w)) for i, w in zip(step.samples, step.weights, strict=True)]
        row = _row(part, plan, prepared)
        found, seconds, names = _measured(variants, Contents(samples, packed), row["supervised"], device)
        rows.append({**row, "seconds": seconds})
        figures.append(found)
        judged += judge(step.index, found, names, base.dtype)
        say(f"certify: step {step.index} computed in {len(VARIANTS)} ways in {sum(seconds.values()):.1f} s")
    certificate = Certificate(_facts(config, base, prepared, truth, padded_batch, device), rows, figures, judged)
    for line in lines(certificate):
        say(line)
    _write(certificate, folder)
    say(f"wrote {folder / TEXT} and {folder / JSON}")
    return certificate


def _measured(
    variants: Variants, contents: Contents, supervised: int, device: torch.device
) -> tuple[dict[str, dict[str, Figures]], dict[str, float], list[str]]:
    """Figures by variant, seconds by variant, and the names that have a true gradient. Holds the truth and one variant at a time."""
    truth = variants.run(TRUTH, contents)
    found, seconds = {TRUTH: measure(truth, truth, supervised, device)}, {TRUTH: truth.seconds}
    for variant in VARIANTS:
        if variant != TRUTH:
            outcome = variants.run(variant, contents)
            found[variant], seconds[variant] = measure(outcome, truth, supervised, device), outcome.seconds
    return found, seconds, list(truth.gradients)


def _row(part: Part, plan: Plan, prepared: PreparedSet) -> dict[str, Any]:
    """What the certificate says about a step."""
    samples, lengths = part.step.samples, plan.lengths
    return {
        "step": part.step.index,
        "samples": len(samples),
        "of": part.whole,
        "from": part.start,
        "ids": [prepared.row(int(i)).id for i in samples],
        "rows": int(lengths.n_tokens[samples].sum()),
        "supervised": int(lengths.n_supervised[samples].sum()),
        "images": int(lengths.n_images[samples].sum()),
        "micro_batches": len(part.step.micro_batches),
    }


def _facts(config: Config, base: Llava, prepared: PreparedSet, truth: str, padded_batch: int, device: torch.device) -> dict[str, Any]:
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
        },
        "kernels": {room: use["implementation"] for room, use in base.kernels().items()},
        "model": {
            "llm": str(config.model.llm),
            "vision_tower": str(base.origin.tower_folder or config.model.llm),
            "projector": base.projector_source,
            "trained": trained,
            "frozen": sum(weight.numel() for weight in base.parameters()) - trained,
            "weights_sha256": _sha256_of(base),
        },
        "data": {
            "records": str(config.data.records),
            "prepared_digest": prepared.digest,
            "samples": len(prepared),
            "quarantined": prepared.manifest["quarantined"],
        },
        "config": config.model_dump(mode="json"),
        "config_sha256": hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest(),
        "versions": versions(),
        "commit": _commit(),
    }


def _sha256_of(model: Llava) -> str:
    """Of all weights as read, by name."""
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        found.update(name.encode())
        found.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _commit() -> str | None:
    """Of the checkout that this code lies in; None where it is installed otherwise. With "+changes" where a file differs from it."""
    git, root = shutil.which("git"), Path(__file__).resolve().parents[2]
    if git is None or not (root / ".git").exists():
        return None

    def said(*words: str) -> str:
        return subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20).stdout.strip()  # noqa: S603

    try:
        return said("rev-parse", "HEAD") + ("+changes" if said("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _folder(config: Config, out: Path | None) -> Path:
    """The folder for the certificate, made. Raises UserError when it cannot be written, before hours of work."""
    folder, key = (config.output_dir, "output_dir") if out is None else (out, "--out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be made ({error.strerror}); give a folder that can") from None
    if not writable:
        raise UserError(f"{key}: {folder} cannot be written; give a folder that can")
    return folder


def _write(certificate: Certificate, folder: Path) -> None:
    try:
        (folder / TEXT).write_text("\n".join(lines(certificate)) + "\n", encoding="utf-8")
        (folder / JSON).write_text(json.dumps(as_json(certificate), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {folder} could not be written ({error.strerror}); make room there or give another folder") from None
