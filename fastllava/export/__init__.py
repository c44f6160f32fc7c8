"""`fastllava export`: a run's result, or any LLaVA checkpoint, whole or as adapters, in a layout that others load; read and compared."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastllava.data.templates import template
from fastllava.errors import UserError
from fastllava.export.chat_template import chat_template
from fastllava.export.check import Check
from fastllava.export.for_peft import write_for_peft
from fastllava.export.subject import Subject, check_start, find_subject, load_subject
from fastllava.model.weights import write_checkpoint
from fastllava.model.weights.merging import MERGES, Merge

LAYOUTS = ("hf", "llava", "peft")


def export(
    checkpoint: Path,
    layout: str,
    out: Path,
    report: Callable[[str], object] = print,
    *,
    merge: str | None = None,
    base: Path | None = None,
) -> None:
    """Write `checkpoint` to the folder `out`, new or empty, in layout "llava" (the original's), "hf" (llava-hf's) or "peft"; check it.

    checkpoint: the output_dir of a run, its checkpoint-N, a whole LLaVA checkpoint in either layout, or LoRA adapters of one. Adapters
    are merged as `merge` says (`model.weights.merging`; fp32 when left out, fp16 writes everything in it), into the model at `base` where
    that is not where the checkpoint says. Layout "peft" writes them unmerged instead, for PEFT on a model of llava-hf.
    The check reads `out` back and compares every tensor bit for bit and the logits of a fixed image and prompt; for hf also those of
    transformers, its missing and unexpected keys, its tokenization, its chat template and its `generate`.
    `report` gets a line for each step.
    Raises UserError when something does not fit, and when a check fails; `out` is then left empty.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout: {layout!r} is no layout; write hf, llava or peft")
    if merge is not None and (merge not in MERGES or layout == "peft"):
        what = "is none, and layout peft merges nothing" if layout == "peft" else "is none"
        raise UserError(f"--merge: {merge!r} {what}; " + ("leave it out" if layout == "peft" else f"write {' or '.join(MERGES)}"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not an empty folder; give a new one")
    subject = find_subject(checkpoint, report, base)
    if subject.added is None and (merge is not None or layout == "peft"):
        option, mend = ("--merge", "leave it out") if merge is not None else ("--layout", "write --layout hf, or llava")
        raise UserError(f"{option}: {merge or layout}, and {checkpoint} holds no adapters; {mend}")
    existed = out.exists()
    try:
        if layout == "peft":
            write_for_peft(subject, out, report)
        else:
            _write_whole(subject, layout, out, report, "fp16" if merge == "fp16" else "fp32")
    except BaseException as error:
        _empty(out, existed)
        if isinstance(error, OSError):
            raise UserError(f"--out: {out} cannot be written ({error.strerror or error}); free space or give another folder") from None
        raise
    if layout == "llava" and "llava" not in out.name.lower():
        report(f"note: the original code picks its loader by the folder's name; before you load {out.name} there, put 'llava' in its name")


def _write_whole(subject: Subject, layout: str, out: Path, report: Callable[[str], object], merge: Merge) -> None:
    """The whole model, with its adapters merged where it has some, read back and compared."""
    if merge == "fp16":
        # Hashes are of weights in the dtype that the run read them in.
        check_start(subject)
        subject = replace(subject, dtype=torch.float16, start={})
    model = load_subject(subject, report, merge)
    check = Check(model, layout, subject.dtype, subject.model, template(subject.template), subject.legacy)
    write_checkpoint(
        model,
        layout,
        out,
        subject.dtype,
        source=subject.model,
        image_policy=subject.image_policy,
        max_tokens=subject.max_tokens,
        chat_template=_chat_template(subject, layout, report),
        # A checkpoint that names none was trained with v1, as the original's were.
        template=None if subject.template == "v1" else subject.template,
        legacy=subject.legacy,
        report=report,
    )
    report(f"wrote {out} in layout {layout}, {str(subject.dtype).removeprefix('torch.')}")
    check.run(out, report)


def _chat_template(subject: Subject, layout: str, report: Callable[[str], object]) -> str | None:
    found = chat_template(template(subject.template)) if layout == "hf" else None
    if layout == "hf" and found is None:
        report(f"chat_template.jinja: not written, as template {subject.template} has none")
    return found


def _empty(out: Path, existed: bool) -> None:
    """Take away what was written; `out` was new or empty before."""
    if not existed:
        shutil.rmtree(out, ignore_errors=True)
        return
    for path in out.iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
