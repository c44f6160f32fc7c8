"""LLaVA in plain PyTorch: transformers' modules on padded batches, every token's logits, none of our modules or kernels.

It reads prepared samples by itself and shares weights' values with our model, and nothing else of it.
Shape letters: B samples, L tokens of the longest, I images, P patches an image, C tower width, D decoder width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllava.batch import IMAGE_ID
from fastllava.certify.plain_lora import adapt
from fastllava.config import Stage
from fastllava.data.loader import Sample
from fastllava.model import hf_reference
from fastllava.model.llava import Llava
from fastllava.model.projectors import kind_of
from fastllava.model.quantised import dense

IGNORED = -100
"""The target of a token that is not supervised."""


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """transformers 4.57 fills an MPT's mask with the least number of fp64 in PyTorch's default dtype, in which there is none so small."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Padded:
    """B samples on the host, as they are before an image has become patches."""

    ids: list[Tensor]
    """int64 [n] each: token ids, IMAGE_ID where an image stands."""
    labels: list[Tensor]
    """int64 [n] each: the ids that are supervised, IGNORED elsewhere."""
    pixels: Tensor
    """uint8 [I, 3, H, W]."""
    images: list[int]
    """How many of `pixels` each sample has, in their order."""
    weights: Tensor
    """fp64 [B]: the weight of each supervised token of a sample."""
    keys: list[Tensor] | None = None
    """int64 [rows] each, patches included: what the dropout of adapters is drawn by; None where nothing is dropped."""


def collate(samples: Sequence[Sample], size: int, images_at_least: int = 0, keys: Sequence[Tensor] | None = None) -> Padded:
    """A batch of these samples, with images of `size` by `size` pixels. A sample of fewer than `images_at_least` gets black ones.

    `keys`: of the rows of each sample, where something is drawn by them.
    """
    images = [[torch.from_numpy(image) for image in sample.images] for sample in samples]
    for its in images:
        its += [torch.zeros(3, size, size, dtype=torch.uint8)] * (images_at_least - len(its))
    pixels = [image for its in images for image in its]
    return Padded(
        ids=[torch.tensor(sample.ids, dtype=torch.int64) for sample in samples],
        labels=[labels_of(sample) for sample in samples],
        pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size, dtype=torch.uint8),
        images=[len(its) for its in images],
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float64),
        keys=None if keys is None else list(keys),
    )


def labels_of(sample: Sample) -> Tensor:
    """int64 [n]: the sample's ids where they are supervised, IGNORED elsewhere."""
    labels = np.full(len(sample.ids), IGNORED, np.int64)
    for begin, end in sample.supervised:
        labels[begin:end] = sample.ids[begin:end]
    return torch.from_numpy(labels)


class PlainLlava:
    """The modules of transformers with the weights of `ours` in `dtype`, and the loss of a padded batch.

    What trains is by the stage's rule alone (llava/train/train.py): the projector, in stage finetune the decoder too, or its adapters.
    """

    def __init__(
        self,
        ours: Llava,
        stage: Stage,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        weights: Mapping[str, Tensor] | None = None,
        attention: str = "sdpa",
    ) -> None:
        """`weights`: those of `ours` by name, on `device` in `dtype`, where they are there already. `attention`: transformers' word."""
        self.dtype, self.device, self.max_tokens = dtype, device, max_tokens
        self.size, self.layer = ours.spec.size, ours.origin.select_layer
        self.wide = torch.promote_types(dtype, torch.float32)
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (ours.spec.mean, ours.spec.std))
        if weights is None:
            weights = {name: weight.to(device, dtype) for name, weight in dense(ours, ours.dtype)}
        self.llm = hf_reference.decoder(ours, weights.__getitem__, dtype, attention).eval()
        self.tower = hf_reference.tower(ours, weights.__getitem__, dtype).eval().requires_grad_(False)
        self.projector = {name: nn.Parameter(weights[f"projector.{name}"]) for name, _ in ours.projector.named_parameters()}
        self._project = partial(kind_of(ours.projector.projector_type).reference, self.projector)
        self._patches = ours.tower.config.patches
        # Of transformers' towers, CLIP's alone has a row before the patches.
        self._first = 1 if self.tower.config.model_type == "clip_vision_model" else 0
        self.llm.requires_grad_(stage == "finetune" and ours.origin.lora is None)
        self._row_keys = adapt(self.llm, ours, weights)

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by our names."""
        decoder = {f"llm.{name}": parameter for name, parameter in self.llm.named_parameters() if parameter.requires_grad}
        return decoder | {f"projector.{name}": parameter for name, parameter in self.projector.items()}

    def loss(self, batch: Padded) -> Tensor:
        """Scalar in fp32, or in fp64 when that is the dtype: the sum of each sample's weight times its supervised tokens' cross-entropy."""
        logits_BLV, targets_BL = self.logits(batch)
        logits_BLV, targets = logits_BLV[:, :-1].to(self.wide), targets_BL[:, 1:]
        losses = F.cross_entropy(logits_BLV.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        weights_B = batch.weights.to(self.device, self.wide)
        return (losses.unflatten(0, targets.shape) * weights_B.unsqueeze(1)).sum()

    def logits(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """Logits [B, L, V] of every token in the model's dtype, and the tokens that are supervised, int64 [B, L], IGNORED elsewhere."""
        embeds_BLD, mask_BL, targets_BL = self._padded(batch)
        padded = None if batch.keys is None else torch.nn.utils.rnn.pad_sequence(batch.keys, batch_first=True)
        self._row_keys.padded = None if padded is None else padded.to(self.device)
        with _default_dtype(self.dtype if self.llm.config.model_type == "mpt" else torch.get_default_dtype()):
            return self.llm(inputs_embeds=embeds_BLD, attention_mask=mask_BL, use_cache=False).logits, targets_BL

    def _features(self, pixels: Tensor) -> Tensor:
        """[I, P, D]: the tower's selected hidden state without the class token, where there is one, projected."""
        if not len(pixels):
            # The projector stays in the graph, with a gradient of zero.
            return self._project(torch.zeros(1, self._patches, self.tower.config.hidden_size, dtype=self.dtype, device=self.device))[:0]
        with torch.no_grad():
            normalised = (pixels.to(self.device).float() / 255 - self.mean) / self.std
            states = self.tower(normalised.to(self.dtype), output_hidden_states=True).hidden_states
        return self._project(states[self.layer][:, self._first :])

    def _padded(self, batch: Padded) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, L, D], mask int64 [B, L], targets int64 [B, L]: padded on the right, cut at `max_tokens` tokens."""
        rows, targets = [], []
        for ids, labels, its_images in zip(batch.ids, batch.labels, self._features(batch.pixels).split(batch.images), strict=True):
            pieces = list(self._pieces(ids.to(self.device), labels.to(self.device), iter(its_images)))
            # Nothing of them, so that the projector is in the graph of a sample that shows none.
            unused = its_images.flatten(0, 1)[:0]
            rows.append(torch.cat([unused, *(piece for piece, _ in pieces)])[: self.max_tokens])
            targets.append(torch.cat([its for _, its in pieces])[: self.max_tokens])
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(its) for its in targets], batch_first=True)
        return pad(rows, batch_first=True), mask, pad(targets, batch_first=True, padding_value=IGNORED)

    def _pieces(self, ids: Tensor, labels: Tensor, features: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Embedded text and images' features in their order, each with its targets."""
        embed = self.llm.get_input_embeddings()
        begin = 0
        for at in [*(ids == IMAGE_ID).nonzero().flatten().tolist(), len(ids)]:
            yield embed(ids[begin:at]), labels[begin:at]
            if at < len(ids):
                feature = next(features)
                yield feature, labels.new_full((len(feature),), IGNORED)
            begin = at + 1
