"""transformers' own LLaVA on padded micro-batches, its Trainer's loss; with recomputation, and with Liger's kernels in it.

Shape letters: B samples of a micro-batch, L tokens of its longest.
"""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benches.lib.ours import Fastllava, Run
from benches.peers.training import Peer, Shared, Tensors, recompute_layers
from fastllava.batch import IMAGE_ID
from fastllava.certify.plain import IGNORED, labels_of
from fastllava.config import LoraConfig
from fastllava.data.loader import Sample
from fastllava.model.hf_reference import filled
from fastllava.model.layers import set_parameter
from fastllava.model.weights.adapter_writing import peft_targets
from fastllava.planner.drawn import CAP, SPECIAL
from fastllava.planner.sizes import SELECT_LAYER
from fastllava.train.metrics.flops import Accounting
from fastllava.train.metrics.log import DeviceScalars

IMAGE_TOKEN = SPECIAL - 1
"""An id that no text here has: transformers gives the image one of the vocabulary."""
PADDING = 0


class Transformers(Peer):
    """`LlavaForConditionalGeneration` with loss and batches as transformers' Trainer runs it."""

    def __init__(self, run: Run, ours: Fastllava, shared: Shared, micro_batch: int, recompute: bool = False) -> None:
        super().__init__(run, ours.device, shared, micro_batch)
        self.recompute = recompute
        self.llava = self._llava()
        projector = self.llava.model.multi_modal_projector
        trained = [projector] if run.config.stage == "pretrain" else [self.llava.model.language_model, self.llava.lm_head, projector]
        parameters = [parameter for module in trained for parameter in module.parameters()]
        if run.origin.lora is not None:
            parameters = [*adapt(self.llava, run.origin.lora, shared.weights), *projector.parameters()]
        self.start([self.llava], parameters)
        if recompute:
            recompute_layers(self.llava, reentrant=False)

    def _llava(self) -> Any:
        """The model, over the weights that all share."""
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig(
            text_config=dict(self.run.size.text),
            vision_config=dict(self.run.size.vision),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=SELECT_LAYER,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
            tie_word_embeddings=False,
        )
        config._attn_implementation = self.attention
        make = functools.partial(
            LlavaForConditionalGeneration._from_config, config, dtype=self.run.dtype, attn_implementation=self.attention
        )
        return filled(make, self.shared.weights.__getitem__, "hf").train()

    @property
    def accounting(self) -> Accounting:
        """Every block of the tower, and every token of the last layer."""
        recompute = "full" if self.recompute else "none"
        return dataclasses.replace(self.run.accounting, blocks=self.run.size.tower.num_hidden_layers, recompute=recompute, last_layer="all")

    def collate(self, samples: Sequence[Sample]) -> Tensors:
        """As a processor: the image's id once for every patch, padding on the right."""
        expanded = [self._expand(sample) for sample in samples]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.run.samples.spec.mean, self.run.samples.spec.std))
        images = [(torch.from_numpy(image).float() / 255 - mean) / std for sample in samples for image in sample.images]
        labels = pad([labels for _, labels in expanded], padding_value=IGNORED)
        return {
            "input_ids": pad([ids for ids, _ in expanded], padding_value=PADDING),
            "attention_mask": pad([torch.ones_like(ids) for ids, _ in expanded], padding_value=0),
            "labels": labels,
            "pixel_values": torch.stack(images) if images else None,
            "supervised": int((labels[:, 1:] != IGNORED).sum()),
        }

    def loss(self, batch: Tensors, supervised: int) -> Tensor:
        """transformers' own, its `num_items_in_batch` counting the whole step as the Trainer does."""
        return self.llava(**self.inputs(batch), num_items_in_batch=supervised, use_cache=False).loss

    def inputs(self, batch: Tensors) -> Tensors:
        """What the model's forward takes."""
        given = {name: value for name, value in batch.items() if name != "supervised"}
        if given["pixel_values"] is not None:
            given["pixel_values"] = given["pixel_values"].to(self.run.dtype)
        return given

    def _expand(self, sample: Sample) -> tuple[Tensor, Tensor]:
        patches = self.run.samples.spec.patches
        ids, labels = torch.from_numpy(sample.ids).long(), labels_of(sample)
        times = torch.where(ids == IMAGE_ID, patches, 1)
        ids = torch.where(ids == IMAGE_ID, IMAGE_TOKEN, ids)
        return ids.repeat_interleave(times)[:CAP], labels.repeat_interleave(times)[:CAP]


def adapt(llava: Any, lora: LoraConfig, weights: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """Put PEFT's adapters on the decoder of transformers' LLaVA, in its dtype, with the values that all share; their parameters.

    PEFT itself keeps them in fp32, and then multiplies in fp32 where nobody has autocast on: its users have it on.
    """
    from peft import LoraConfig as Adapters
    from peft import inject_adapter_in_model

    alpha = lora.scale * (lora.rank or 0)
    wanted: Any = {"r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout, "target_modules": peft_targets(lora.targets)}
    inject_adapter_in_model(Adapters(**wanted), llava)
    found = []
    for name, _ in list(llava.named_parameters()):
        if ".lora_" in name:
            ours = "llm.model." + name.partition("language_model.")[2].replace(".default", "")
            set_parameter(llava, name, nn.Parameter(weights[ours]))
            found.append(llava.get_parameter(name))
    return found


def no_peft(run: Run) -> str | None:
    """Why transformers' variants cannot run with adapters here, or None."""
    if run.origin.lora is None or importlib.util.find_spec("peft"):
        return None
    return "peft is not installed; run pip install -e '.[dev]'"


class TransformersLiger(Transformers):
    """The same with Liger's LLaVA patch, which changes transformers for the whole process: here for this variant's steps only.

    Its forward pass of the whole model returns what transformers 5.24 has no place for, after the work is done: here are its lines
    that compute, the decoder patched and its fused linear cross-entropy on every token.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        from liger_kernel.transformers import apply_liger_kernel_to_llava

        super().__init__(*args, **options)
        before = _globals()
        apply_liger_kernel_to_llava(model=self.llava, fused_linear_cross_entropy=False)
        self._changes = _changes(before)
        for owner, name, old, _ in self._changes:
            setattr(owner, name, old)

    def step(self, batches: Sequence[Tensors], judged: bool = False) -> DeviceScalars:
        """One step, as any variant takes it, with the patch in place."""
        with patched(self._changes):
            return super().step(batches, judged)

    def loss(self, batch: Tensors, supervised: int) -> Tensor:
        """As liger_kernel.transformers.model.llava computes it."""
        from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

        given = self.inputs(batch)
        labels = given.pop("labels")
        head = self.llava.lm_head.weight
        hidden = self.llava.model(**given, use_cache=False)[0]
        loss = LigerForCausalLMLoss(hidden, head, labels, hidden_size=head.shape[1], num_items_in_batch=supervised)
        return loss if isinstance(loss, Tensor) else loss.loss


Change = tuple[Any, str, Any, Any]
"""Owner, name, what stood there, what stands there now."""


@contextmanager
def patched(changes: Sequence[Change]) -> Iterator[None]:
    """With the changes made, and unmade at the end."""
    for owner, name, _, new in changes:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old, _ in changes:
            setattr(owner, name, old)


def _globals() -> dict[tuple[Any, str], Any]:
    """What a patch of LLaVA can replace: names of the modules that it and its parts are made in, and methods of their classes."""
    found: dict[tuple[Any, str], Any] = {}
    for part in ("llava", "llama", "clip"):
        module = sys.modules.get(f"transformers.models.{part}.modeling_{part}")
        if not isinstance(module, ModuleType):
            continue
        for name, value in vars(module).items():
            found[module, name] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {(value, method): function for method, function in vars(value).items() if callable(function)}
    return found


def _changes(before: dict[tuple[Any, str], Any]) -> list[Change]:
    after = _globals()
    # The methods of a class that was replaced as a whole are not there any more; its name in the module is.
    pairs = ((owner, name, old, after.get((owner, name), old)) for (owner, name), old in before.items())
    return [(owner, name, old, new) for owner, name, old, new in pairs if new is not old]


def no_liger(device: torch.device) -> str | None:
    """Why Liger's variant cannot run here, or None."""
    if device.type != "cuda":
        return "Liger's kernels need a CUDA GPU"
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
