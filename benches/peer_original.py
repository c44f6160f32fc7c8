"""The original's recipe as it computes (haotian-liu/LLaVA, c121f04), in our own words over transformers' modules.

Padded micro-batches, every block of CLIP on every image, a black image for a sample that has none, rows put together sample by
sample on the device, full recomputation of the decoder, fp32 logits of every row. One thing is ours, and costs nothing: a micro-batch
weighs as much as it has supervised tokens, not the same as any other, so that all variants have one loss and one gradient.

Shape letters: B samples of a micro-batch, L rows of its longest, P patches an image, D decoder width, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benches import models
from benches.ours import Run
from benches.peer_training import IGNORED, Peer, Shared, Tensors, labels_of, pixels_of
from benches.synthetic import CAP
from fastllava.batch import IMAGE_ID
from fastllava.data.loader import Sample
from fastllava.data.plan import Step
from fastllava.model.llava import Llava
from fastllava.train.metrics.flops import Accounting

PADDING = 0


class Original(Peer):
    """LlamaForCausalLM, CLIPVisionModel and a Sequential, joined as llava_arch.py joins them."""

    def __init__(self, run: Run, ours: Llava, device: torch.device, micro_batch: int, attention: str, shared: Shared) -> None:
        super().__init__(run, device, micro_batch, attention, shared)
        self.llm = models.llama_of_transformers(run.size, ours, attention, shared.weights)
        self.tower = models.clip_of_transformers(run.size, ours, "sdpa", shared.weights)
        self.projector = models.projector_as_sequential(run.size, shared.weights)
        self.modules = [self.llm, self.tower, self.projector]
        self.start(*([self.projector] if run.config.stage == "pretrain" else [self.llm, self.projector]))
        # train.py:852-858; the re-entrant kind is what transformers 4.37 has.
        models.recompute_layers(self.llm, reentrant=True)
        self.llm.enable_input_require_grads()

    @property
    def accounting(self) -> Accounting:
        """Every block of the tower, every row of the last layer, and everything of the decoder twice forward."""
        return dataclasses.replace(self.run.accounting, blocks=self.run.size.clip.num_hidden_layers, recompute="full", last_layer="all")

    def images(self, step: Step) -> int:
        """One for each sample, black ones included."""
        return len(step.samples)

    def collate(self, samples: Sequence[Sample]) -> Tensors:
        """DataCollatorForSupervisedDataset (train.py:742-773)."""
        ids = [torch.from_numpy(sample.ids).long() for sample in samples]
        size = self.run.samples.spec.size
        images = [image for sample in samples for image in pixels_of([sample], self.run) or [torch.zeros(3, size, size)]]
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PADDING)
        return {
            "input_ids": input_ids,
            "labels": torch.nn.utils.rnn.pad_sequence([labels_of(s) for s in samples], batch_first=True, padding_value=IGNORED),
            "attention_mask": input_ids.ne(PADDING),
            "images": torch.stack(images),
            "supervised": sum(int((labels_of(sample)[1:] != IGNORED).sum()) for sample in samples),
        }

    def loss(self, batch: Tensors, supervised: int) -> Tensor:
        """The mean over the micro-batch (transformers 4.37, modeling_llama.py), times its share of the step's tokens."""
        embeds_BLD, mask_BL, labels_BL = self._prepare_inputs(batch)
        logits_BLV = self.llm(inputs_embeds=embeds_BLD, attention_mask=mask_BL, use_cache=False).logits.float()
        shifted = logits_BLV[..., :-1, :].contiguous()
        targets = labels_BL[..., 1:].contiguous()
        mean = F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1), ignore_index=IGNORED)
        return mean * (batch["supervised"] / supervised)

    def _features(self, images: Tensor) -> Tensor:
        """[B, P, D] (clip_encoder.py:45-57, then the projector): the tower keeps all its hidden states and the last but one is used."""
        with torch.no_grad():
            found = self.tower(images.to(self.run.dtype), output_hidden_states=True)
            selected = found.hidden_states[models.SELECT_LAYER][:, 1:].to(self.run.dtype)
        return self.projector(selected)

    def _prepare_inputs(self, batch: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, L, D], mask [B, L] and labels [B, L] (llava_arch.py:145-324): each sample is put together by itself."""
        features = self._features(batch["images"])
        embed = self.llm.get_input_embeddings()
        rows, labels = [], []
        # Every sample takes one image, whether it shows it or not.
        for ids, mask, its_labels, image in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], features, strict=True):
            joined, joined_labels = _splice(ids[mask], its_labels[mask], image, embed)
            rows.append(joined[:CAP])
            labels.append(joined_labels[:CAP])
        longest = max(len(each) for each in rows)
        mask_BL = torch.zeros(len(rows), longest, dtype=torch.bool, device=self.device)
        labels_BL = torch.full((len(rows), longest), IGNORED, device=self.device)
        padded = []
        for number, (each, its_labels) in enumerate(zip(rows, labels, strict=True)):
            padded.append(torch.cat((each, each.new_zeros(longest - len(each), each.shape[1]))))
            mask_BL[number, : len(each)] = True
            labels_BL[number, : len(each)] = its_labels
        return torch.stack(padded), mask_BL, labels_BL


def _splice(ids: Tensor, labels: Tensor, image_PD: Tensor, embed: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Rows and labels of one sample; its image where the mark stands. Waits for the device, as the original does."""
    marked = ids == IMAGE_ID
    if marked.sum() == 0:
        # The projector stays in the graph, with a gradient of zero.
        return torch.cat((embed(ids), image_PD[0:0])), labels
    at = torch.where(marked)[0].tolist()[0]
    text = embed(torch.cat((ids[:at], ids[at + 1 :])))
    before, after = torch.split(text, [at, len(ids) - at - 1])
    no_labels = torch.full((len(image_PD),), IGNORED, device=labels.device, dtype=labels.dtype)
    return torch.cat((before, image_PD, after)), torch.cat((labels[:at], no_labels, labels[at + 1 :]))
