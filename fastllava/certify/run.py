"""The certificate of a run from its config: the samples, every variant of every step, the verdict, the two files."""

import json
import os
from pathlib import Path

import torch
from torch import nn

from fastllava.certify import facts
from fastllava.certify.judge import Figures, judge, measure
from fastllava.certify.page import Certificate, as_json, lines
from fastllava.certify.selection import Selection, choose
from fastllava.certify.variants import TRUTH, VARIANTS, Contents, Variants
from fastllava.config import Config
from fastllava.console.speaker import Say
from fastllava.data.loader import read_sample, steps
from fastllava.data.plan import Plan, held_out_of
from fastllava.data.row_keys import row_keys
from fastllava.distributed.processes import ALONE
from fastllava.errors import UserError
from fastllava.model.execution import Execution
from fastllava.model.layers import set_parameter
from fastllava.model.llava import Llava
from fastllava.model.lora import drawn
from fastllava.model.weights import load_llava
from fastllava.train.dataset import prepare_data
from fastllava.train.machine import check_run
from fastllava.train.metrics.flops import Accounting
from fastllava.train.template import with_template

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
    config = with_template(config, say)
    _, spec, prepared = prepare_data(config, say)
    held_out = held_out_of(len(prepared), config.eval.share, config.train.seed)
    plan = Plan(prepared, config.data, config.train, Accounting.of(config).cost(), held_out=held_out)
    parts = choose(plan, n_steps, n_samples, config.train.seed)
    base = load_llava(config.model, Execution.of(config, ops), config.train.seed, config.lora)
    drew = _draw_what_is_zero(base, config.train.seed)
    seed = config.train.seed if config.lora.draws else None
    if truth is None:
        truth = "fp64" if device.type == "cpu" or config.train.precision == "fp32" else "fp32"
    variants = Variants(config, base, device, TRUTHS[truth], padded_batch)
    rows, figures, judged = [], [], []
    # Few samples: a worker would take longer to start than they do to read.
    data, chosen = config.data.model_copy(update={"workers": 0}), Selection(tuple(part.step for part in parts))
    for part, (step, packed) in zip(parts, steps(chosen, 0, prepared, spec, data, pin=False, seed=seed), strict=True):
        samples = [read_sample(prepared, spec, data, int(i), float(w)) for i, w in zip(step.samples, step.weights, strict=True)]
        row = facts.of_step(part, plan, prepared)
        numbers, rows_each = step.samples.tolist(), plan.lengths.n_tokens[step.samples].tolist()
        keys = None if seed is None else torch.from_numpy(row_keys(seed, step.index, numbers, rows_each)).split(rows_each)
        found, seconds, names = _measured(variants, Contents(samples, packed, keys), row["supervised"])
        rows.append({**row, "seconds": seconds})
        figures.append(found)
        judged += judge(step.index, found, names, base.dtype)
        say(f"certify: step {step.index} computed in {len(VARIANTS)} ways in {sum(seconds.values()):.1f} s")
    certificate = Certificate(facts.of_run(config, base, prepared, truth, padded_batch, device, drew), rows, figures, judged)
    for line in lines(certificate):
        say(line)
    _write(certificate, folder)
    say(f"wrote {folder / TEXT} and {folder / JSON}")
    return certificate


def _draw_what_is_zero(model: Llava, seed: int) -> bool:
    """Give each B of new adapters, which is zero and leaves A without a gradient, small numbers of its own; whether there was one."""
    drew = False
    for name, parameter in list(model.named_parameters()):
        if name.endswith("lora_B.weight") and not parameter.any():
            values = 0.1 * drawn(name.replace("lora_B", "lora_A"), parameter.shape, seed)
            set_parameter(model, name, nn.Parameter(values.to(parameter.dtype)))
            drew = True
    return drew


def _measured(variants: Variants, contents: Contents, supervised: int) -> tuple[dict[str, dict[str, Figures]], dict[str, float], list[str]]:
    """Figures by variant, seconds by variant, and the names that have a true gradient. Holds the truth and one variant at a time."""
    truth = variants.run(TRUTH, contents)
    found, seconds = {}, {}
    for variant in VARIANTS:
        outcome = truth if variant == TRUTH else variants.run(variant, contents)
        found[variant] = measure(outcome, truth, supervised, variants.device)
        seconds[variant] = outcome.seconds
    return found, seconds, list(truth.gradients)


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
        raise UserError(f"--out: {folder} could not be written ({error.strerror}); free space there or give another folder") from None
