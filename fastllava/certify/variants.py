"""The five ways to compute a step that a certificate compares, all from the same weights, and what each gives: loss and gradients."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastllava.batch import Batch
from fastllava.certify.plain import PlainLlava, collate
from fastllava.config import Config, without_levers
from fastllava.data.loader import Sample, pack
from fastllava.errors import UserError
from fastllava.model.build import rebuilt
from fastllava.model.execution import Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import Ops, reference_ops
from fastllava.train.stages import prepare_stage

TRUTH = "truth"
VARIANTS: Mapping[str, str] = {
    TRUTH: "plain PyTorch: transformers' modules on padded batches, every row's logits; in the precision of the truth",
    "plain": "the same in the precision of the run",
    "single": "the trainer's modules, every kernel the reference and no lever such as train.fp8, one sample at a time",
    "packed": "the same, samples packed as the run packs them",
    "configured": "the run as configured: packed, with its kernels, levers, recompute and compile",
}
"""What each computes, in the order in which they run."""


@dataclass(frozen=True)
class Contents:
    """A step's samples, and the micro-batches that the trainer's loader makes of them."""

    samples: Sequence[Sample]
    packed: Sequence[Batch]
    keys: Sequence[Tensor] | None = None
    """int64 [rows] for each sample: what the dropout of adapters is drawn by; None where nothing is dropped."""


@dataclass(frozen=True)
class Outcome:
    """What a variant gave on one step."""

    loss: float
    gradients: Mapping[str, Tensor]
    """fp32 on the host, by our names; those that were given at all."""
    seconds: float


@dataclass(frozen=True)
class Variants:
    """Runs the variants of one run. One model at a time lives on the device; gradients leave it as backward finishes each."""

    config: Config
    base: Llava
    """The model as read, on the host, with the run's kernels."""
    device: torch.device
    truth: torch.dtype
    padded_batch: int
    """Samples of a padded batch."""

    def run(self, variant: str, contents: Contents) -> Outcome:
        """Loss and gradients of the step. Raises UserError when the device has too little memory."""
        began = time.monotonic()
        try:
            with _products(tf32=self.config.train.tf32 and variant != TRUTH):
                loss, gradients = self._run(variant, contents)
        except torch.OutOfMemoryError:
            raise UserError(self._too_little(variant)) from None
        finally:
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        return Outcome(loss, gradients, time.monotonic() - began)

    def _run(self, variant: str, contents: Contents) -> tuple[float, dict[str, Tensor]]:
        if variant in (TRUTH, "plain"):
            dtype = self.truth if variant == TRUTH else self.base.dtype
            plain = PlainLlava(self.base, self.config.stage, dtype, self.device, self.config.data.max_tokens)
            size, step = self.base.spec.size, self.padded_batch
            starts = range(0, len(contents.samples), step)
            keys = contents.keys
            of = lambda start: None if keys is None else keys[start : start + step]  # noqa: E731
            padded = (collate(contents.samples[start : start + step], size, keys=of(start)) for start in starts)
            return accumulate(plain.trained(), [partial(plain.loss, batch) for batch in padded])
        config, ops = self.config, Ops(self.base.chosen)
        if variant != "configured":
            config, ops = _plainly(config), reference_ops()
        model = rebuilt(self.base, Execution.of(config, ops))
        trained = prepare_stage(model, config)
        model.to(self.device)
        batches: Sequence[Batch] = contents.packed
        if variant == "single":
            batches = [pack([sample], self.base.spec, self.config.data.max_tokens) for sample in contents.samples]
            if contents.keys is not None:
                batches = [replace(batch, row_keys=keys) for batch, keys in zip(batches, contents.keys, strict=True)]
        return accumulate(trained, [partial(_on_device, model, batch, self.device) for batch in batches])

    def _too_little(self, variant: str) -> str:
        if variant in (TRUTH, "plain"):
            smaller = "write --padded-batch 1" if self.padded_batch > 1 else "write a smaller data.max_tokens"
        else:
            smaller = "write train.recompute=full and a smaller train.micro_batch_tokens"
        return f"certify: '{variant}' ({VARIANTS[variant]}) needs more memory than this GPU has; {smaller}, or train.device=cpu"


def accumulate(trained: Mapping[str, nn.Parameter], losses: Sequence[Callable[[], Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """The sum of the losses and the gradients it leaves, added up over micro-batches on the host as `.grad` adds them up."""
    found: dict[str, Tensor] = {}

    def take(name: str, parameter: nn.Parameter) -> None:
        gradient: Any = parameter.grad
        wide = torch.promote_types(gradient.dtype, torch.float32)
        parameter.grad = None
        if name in found:
            found[name] += gradient.to("cpu", wide)
        else:
            found[name] = gradient.detach().to("cpu", wide, copy=True)

    hooks = [parameter.register_post_accumulate_grad_hook(partial(take, name)) for name, parameter in trained.items()]
    total = 0.0
    for loss in losses:
        part = loss()
        part.backward()
        total += float(part.detach())
    for hook in hooks:
        hook.remove()
    return total, {name: found.pop(name).float() for name in list(found)}


def _plainly(config: Config) -> Config:
    """`config` without levers and graphs."""
    plain = without_levers(config)
    return plain.model_copy(update={"train": plain.train.model_copy(update={"compile": "off"})})


def _on_device(model: Llava, batch: Batch, device: torch.device) -> Tensor:
    return model(batch.to(device))


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """fp32 products and convolutions with TF32, or without."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
