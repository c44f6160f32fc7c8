"""The original's recipe as it computes (haotian-liu/LLaVA, c121f04), over the padded LLaVA in plain PyTorch of the certificate.

Padded micro-batches, every block of CLIP on every image, a black image for a sample that has none, embeddings put together sample by
sample on the device, full recomputation of the decoder, fp32 logits of every token. One thing is ours, and costs nothing: a micro-batch
weighs as much as it has supervised tokens, not the same as any other, so that all variants have one loss and one gradient.

Shape letters: B samples of a micro-batch, L tokens of its longest, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benches.lib.ours import Fastllava, Run
from benches.peers.training import Peer, Shared, recompute_layers
from fastllava.certify.plain import IGNORED, PlainLlava, collate
from fastllava.data.loader import Sample
from fastllava.data.plan import Step
from fastllava.planner.drawn import CAP
from fastllava.train.metrics.flops import Accounting


class Original(Peer):
    """LlamaForCausalLM, CLIPVisionModel and the projector's Linears, joined as llava_arch.py joins them."""

    def __init__(self, run: Run, ours: Fastllava, shared: Shared, micro_batch: int) -> None:
        super().__init__(run, ours.device, shared, micro_batch)
        self.plain = PlainLlava(ours.model, run.config.stage, run.dtype, self.device, CAP, shared.weights, self.attention)
        self.plain.llm.train()
        # train.py:852-858; the re-entrant kind is what transformers 4.37 has.
        recompute_layers(self.plain.llm, reentrant=True)
        self.plain.llm.enable_input_require_grads()
        self.start([self.plain.llm, self.plain.tower], self.plain.trained().values(), self.plain.projector.values())

    @property
    def accounting(self) -> Accounting:
        """Every block of the tower, every token of the last layer, and everything of the decoder twice forward."""
        return dataclasses.replace(self.run.accounting, blocks=self.run.size.tower.num_hidden_layers, recompute="full", last_layer="all")

    def images(self, step: Step) -> int:
        """One for each sample, black ones included."""
        return len(step.samples)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """As DataCollatorForSupervisedDataset (train.py:742-773)."""
        padded = collate(samples, self.run.samples.spec.size, images_at_least=1)
        return {"padded": padded, "supervised": sum(int((labels[1:] != IGNORED).sum()) for labels in padded.labels)}

    def loss(self, batch: dict[str, Any], supervised: int) -> Tensor:
        """The mean over the micro-batch (transformers 4.37, modeling_llama.py), times its share of the step's tokens."""
        logits_BLV, targets_BL = self.plain.logits(batch["padded"])
        shifted, targets = logits_BLV.float()[:, :-1].contiguous(), targets_BL[:, 1:].contiguous()
        mean = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1), ignore_index=IGNORED)
        return mean * (batch["supervised"] / supervised)
