"""Adapters for PEFT on a model of llava-hf: in the names of its modules, beside that model where it is not one already."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from fastllava.data.templates import template
from fastllava.errors import UserError
from fastllava.export.chat_template import chat_template
from fastllava.export.check import Check, failed
from fastllava.export.subject import Subject, load_subject
from fastllava.model.llava import Llava
from fastllava.model.weights import write_checkpoint
from fastllava.model.weights.adapter_writing import write_adapter
from fastllava.model.weights.adapters import read_adapter
from fastllava.model.weights.merging import NOTHING
from fastllava.model.weights.write import not_in_hf

BASE = "base"


def write_for_peft(subject: Subject, out: Path, report: Callable[[str], object]) -> None:
    """Write adapters and projector of `subject` to `out`, for `PeftModel.from_pretrained(LlavaForConditionalGeneration, out)`.

    The model they lie on stays where it is when it is in llava-hf's layout; else it is written to `out`/base in that.
    Raises UserError when that layout cannot hold it, and when a check of what was written fails. Raises OSError.
    """
    added, lora = subject.added, subject.lora
    if added is None or lora is None:
        raise UserError("--layout: peft writes adapters, and CHECKPOINT holds none; write --layout hf, or llava")
    # The adapters are left out, and the projector, which was trained whole, is in it.
    model = load_subject(replace(subject, added=replace(NOTHING, where=added.where)), report)
    if (reason := not_in_hf(model)) is not None:
        raise UserError(
            f"--layout: PEFT's base is in Hugging Face's layout, which {reason}; write --layout llava, which merges the adapters"
        )
    base = subject.model.llm.absolute()
    if model.origin.layout != "hf":
        base = out.absolute() / BASE
        _write_base(model, subject, base, report)
    state = {**added.tensors, **_projector(subject, model)}
    del model
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    write_adapter(out, "hf", lora, state, dtype, base=str(base))
    report(f"wrote {out} for PEFT, {str(dtype).removeprefix('torch.')}, on {base}")
    again = read_adapter(out, "--out")
    if (found := {**again.tensors(), **again.projector()}).keys() != state.keys() or again.scale != added.scale:
        raise failed("the adapters were not read back as they were written")
    for name, tensor in state.items():
        if not torch.equal(found[name], tensor.to(dtype)):
            raise failed(f"tensor {name} was not read back as it was written")
    report(f"check: all {len(state)} tensors read back bit for bit")
    merged = load_subject(subject, lambda line: None)
    check = Check(merged, "hf", subject.dtype, subject.model, template(subject.template), subject.legacy)
    check.with_peft(base, out, report)


def _projector(subject: Subject, model: Llava) -> dict[str, Tensor]:
    """The projector as it is stored, by our names."""
    stored = {name: tensor for name, tensor in subject.weights.items() if name.startswith("projector.")}
    if not stored and subject.model.adapter is not None:
        stored = read_adapter(subject.model.adapter, "CHECKPOINT").projector()
    return stored or {f"projector.{name}": tensor for name, tensor in model.projector.state_dict().items()}


def _write_base(model: Llava, subject: Subject, folder: Path, report: Callable[[str], object]) -> None:
    write_checkpoint(
        model,
        "hf",
        folder,
        subject.dtype,
        source=subject.model,
        image_policy=subject.image_policy,
        max_tokens=subject.max_tokens,
        chat_template=chat_template(template(subject.template)),
        legacy=subject.legacy,
        report=report,
    )
    report(f"wrote {folder}, the model that the adapters lie on, in layout hf")
