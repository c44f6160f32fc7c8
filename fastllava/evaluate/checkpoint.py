"""A trained model ready to be asked: its weights on a device, its tokenizer, and how it was trained."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastllava.data.templates import Template, template
from fastllava.data.tokenizer import Tokenizer
from fastllava.distributed.processes import ALONE, Processes
from fastllava.errors import UserError
from fastllava.export.subject import find_subject, load_subject
from fastllava.model.build import rebuilt
from fastllava.model.execution import Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import choose_ops
from fastllava.train.dataset import load_tokenizer
from fastllava.train.state.fingerprint import fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"
PRECISIONS = (AUTO, *DTYPES)
"""The words of `--precision`. auto: the checkpoint's own where there is a GPU; else fp32, which is faster on a CPU than the halves."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint of any kind, loaded."""

    name: str
    """The last part of its path, and for a checkpoint-N the part before too: the `model_id` of answers files."""
    folder: Path
    model: Llava
    """On its device, frozen, computing in `model.dtype`."""
    tokenizer: Tokenizer
    form: Template
    """The template it was trained with, unless another was asked for."""
    image_policy: Literal["square", "pad"]
    max_tokens: int
    """A prompt with a picture is cut here, its patches counted, as in training."""
    base: Path | None
    """The model that it was trained from, where it was asked for by `--base`."""
    identity: str
    """A hash of the weights and of what decides the computation, wherever and in whatever files they lie."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens that end an answer: those of generation_config.json, the tokenizer's own, and the template's mark where it is one."""
        origin = self.model.origin
        given = origin.generation.get("eos_token_id", origin.text.get("eos_token_id"))
        found = [*(given if isinstance(given, list) else [given]), self.tokenizer.eos_id]
        if self.form.style in ("mpt", "turns"):
            found.append(self.tokenizer.control(self.form.marks[-1]))
        return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))

    def with_template(self, name: str) -> "Trained":
        """The same model, asked with the template called `name`. Raises UserError that lists the names."""
        try:
            return replace(self, form=template(name))
        except UserError as error:
            raise UserError(str(error).replace("data.template", "--template")) from None


def load_trained(
    checkpoint: Path,
    report: Callable[[str], object] = lambda line: None,
    *,
    precision: str = AUTO,
    device: torch.device | None = None,
    group: Processes = ALONE,
    base: Path | None = None,
) -> Trained:
    """The model of `checkpoint`: a run's output_dir, its checkpoint-N, a whole LLaVA in the original's layout or llava-hf's, or adapters.

    precision: one of PRECISIONS. device: the GPU of this process when there is one, else the CPU, when left out. `report` gets a
    line for what was found. base: where the model lies that it was trained from, when not where it says.
    Each process of `group` loads it. Raises UserError.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision: '{precision}' is none; write one of {', '.join(PRECISIONS)}")
    device = _device(group.local_rank) if device is None else device
    subject = find_subject(checkpoint, report, base)
    path = subject.model.tokenizer or subject.model.llm
    tokenizer = load_tokenizer(path, subject.legacy, "CHECKPOINT")
    loaded = load_subject(subject, report)
    vocabulary = loaded.llm.config.vocab_size
    if tokenizer.text_size > vocabulary:
        raise UserError(
            f"CHECKPOINT: its tokenizer {path} writes {tokenizer.text_size} tokens and the model has {vocabulary}; give its own"
        )
    identity = hashlib.sha256(json.dumps(fingerprint(loaded, group), sort_keys=True).encode()).hexdigest()
    if precision == AUTO:
        dtype = subject.dtype if torch.cuda.is_available() else torch.float32
    else:
        dtype = DTYPES[precision]
    torch.set_float32_matmul_precision("highest")
    model = rebuilt(loaded, Execution(choose_ops({}, device, dtype, sizes=loaded.origin.sizes), dtype))
    del loaded
    model = model.to(device, dtype).requires_grad_(False).eval()
    report(f"{checkpoint} answers in {str(dtype).removeprefix('torch.')} on {device}")
    policy: Literal["square", "pad"] = "pad" if subject.image_policy == "pad" else "square"
    return Trained(
        _name(checkpoint.resolve()), checkpoint, model, tokenizer, template(subject.template), policy, subject.max_tokens, base, identity
    )


def _name(path: Path) -> str:
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name


def _device(local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return torch.device("cpu")
    if local_rank >= gpus:
        raise UserError(f"torchrun: --nproc-per-node asks for more processes than the {gpus} GPUs here; write {gpus}")
    return torch.device("cuda", local_rank)
