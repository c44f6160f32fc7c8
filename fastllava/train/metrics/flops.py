"""The floating-point operations of a step: those the training needs (MFU), and those the machine does (HFU).

Counted as in the PaLM paper (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): matrix products only, a multiply-add is two
operations, the backward of a product is two products. With four differences that make the figure smaller and honest: what is frozen
has no weight gradient, attention counts the pairs of rows that see each other, lm_head counts supervised rows, and so does the last
decoder layer apart from its keys and values, as nothing reads the rest of it.

Both shares are of the dense bf16 peak, whatever the products are computed in: `train.fp8` makes them larger, never smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastllava.config import Config, LoraConfig, Recompute, Rows, Stage
from fastllava.data.balance import Cost
from fastllava.model.architecture import Architecture
from fastllava.model.build import build_projector
from fastllava.model.decoders import DecoderConfig
from fastllava.model.ops import reference_ops
from fastllava.model.towers import TowerConfig
from fastllava.model.weights import read_origin

REPEATED: Mapping[Recompute, Sequence[str]] = {
    "none": (),
    "norms": (),
    "selective": ("gate", "up"),
    "full": ("q", "k", "v", "o", "gate", "up"),
}
"""The products of a layer that backward does again; with `full` attention too."""

PEAK_FLOPS: Mapping[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 operations a second, from NVIDIA's data sheets; the first name that is part of the device's counts."""


def peak_flops(device_name: str) -> float | None:
    """The GPU's dense bf16 peak, or None for one that is not listed."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def peak_of(device: torch.device) -> float | None:
    """`peak_flops` of the device itself; None for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class Work:
    """What a step is made of; every field is a sum over its samples."""

    rows: int
    """Packed rows, text and patches."""
    pairs: int
    """(query, key) pairs of causal attention: L (L + 1) / 2 for a sample of L rows."""
    images: int
    supervised: int
    """Rows whose next token counts in the loss."""

    @classmethod
    def of(cls, n_tokens: ArrayLike, n_images: ArrayLike, n_supervised: ArrayLike) -> "Work":
        """The work of samples with these rows, images and supervised rows."""
        lengths = np.asarray(n_tokens, dtype=np.int64)
        return cls(
            rows=int(lengths.sum()),
            pairs=int((lengths * (lengths + 1) // 2).sum()),
            images=int(np.asarray(n_images, dtype=np.int64).sum()),
            supervised=int(np.asarray(n_supervised, dtype=np.int64).sum()),
        )


@dataclass(frozen=True)
class Flops:
    """Operations of a step, by part."""

    tower: float
    projector: float
    decoder: float
    """Matrix products of the layers."""
    attention: float
    """The decoder's attention; the tower's is in `tower`."""
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.tower + self.projector + self.decoder + self.attention + self.head


@dataclass(frozen=True)
class Accounting:
    """Counts the operations of any step of one run."""

    llm: DecoderConfig
    tower: TowerConfig
    blocks: int
    """Blocks of the tower that run: 23 of CLIP-L's 24 for select_layer -2."""
    projector: float
    """Operations of the projector for one image, forward and backward."""
    stage: Stage
    recompute: Recompute = "none"
    last_layer: Rows = "supervised"
    lora: LoraConfig | None = None
    """The adapters that train in place of the decoder."""

    @classmethod
    def of(cls, config: Config) -> "Accounting":
        """The accounting of a run; reads the config.json files of its model. Raises UserError, as `read_origin`."""
        return cls.of_model(read_origin(config.model, config.lora), config.stage, config.train.recompute, config.train.last_layer)

    @classmethod
    def of_model(
        cls, architecture: Architecture, stage: Stage, recompute: Recompute = "none", last_layer: Rows = "supervised"
    ) -> "Accounting":
        """Accounts for a stage of training `architecture`."""
        tower = architecture.tower
        with torch.device("meta"):
            projector = build_projector(architecture, reference_ops())
        return cls(
            llm=architecture.llm,
            tower=tower,
            blocks=architecture.select_layer % (tower.num_hidden_layers + 1),
            projector=architecture.spec.patches * projector.operations(),
            stage=stage,
            recompute=recompute,
            last_layer=last_layer,
            lora=architecture.lora,
        )

    def cost(self) -> Cost:
        """What the plan balances ranks by: the operations that each part of a sample adds to a step of this trainer."""
        row, pair, image, supervised = (int(self.hardware_flops(Work(*unit)).total) for unit in np.eye(4, dtype=int).tolist())
        return Cost(per_row=row, per_pair=pair, per_image=image, per_supervised=supervised)

    def model_flops(self, work: Work, rows: Rows = "supervised") -> Flops:
        """What the training of a step needs, whoever does it.

        A frozen product needs its input's gradient only, a trained one its weight's too. The last layer's queries, output and
        MLP, and lm_head, are needed for supervised rows: there is no loss on the others. `rows="all"` is the convention of
        trainers that compute these for every row, for comparison with their figures. Attention of the last layer counts every
        pair either way: which of them are needed depends on where the supervised rows lie.
        """
        counted = work.supervised if rows == "supervised" else work.rows
        passes = self._passes()
        return Flops(
            tower=work.images * self._tower(),
            projector=work.images * self.projector,
            decoder=passes * self._layers(work, counted, self._products()) + 3 * self._layers(work, counted, self._adapters()),
            attention=3 * work.pairs * self._attention(),
            head=passes * counted * 2.0 * self.llm.hidden_size * self.llm.vocab_size,
        )

    def forward_flops(self, work: Work) -> float:
        """What one forward does, whatever trains; of the projector a third, as if it were products alone."""
        needed = self.model_flops(work)
        decoder = self._layers(work, work.supervised, self._products()) + self._layers(work, work.supervised, self._adapters())
        return needed.tower + decoder + needed.head / self._passes() + (needed.attention + needed.projector) / 3

    def hardware_flops(self, work: Work) -> Flops:
        """What this trainer does: the above, the last layer's rows that `train.last_layer` adds, and what recompute does again.

        That is never a layer's last product, whose output backward has no use for. The scores that a fused attention forms again
        in its backward are not counted, as is the custom.
        """
        needed = self.model_flops(work)
        rows = work.supervised if self.last_layer == "supervised" else work.rows
        products, adapters, repeated = self._products(), self._adapters(), REPEATED[self.recompute]
        again = {name: products[name] for name in repeated if name in products}
        # What goes into a B is never kept by a layer that is computed again, and what comes out goes with the product beside it.
        into = {} if self.recompute == "none" else self._adapters(("A",))
        out_of = {name: part for name, part in self._adapters(("B",)).items() if name in repeated}
        # The columns that attention gets beside those of the heads, for MPT's ALiBi.
        attention = needed.attention * self.llm.attention_width / self.llm.head_dim
        return Flops(
            tower=needed.tower,
            projector=needed.projector,
            decoder=self._passes() * self._layers(work, rows, products)
            + self._layers(work, rows, again)
            + 3 * self._layers(work, rows, adapters)
            + self._layers(work, rows, into)
            + self._layers(work, rows, out_of),
            attention=attention * (4 / 3 if self.recompute == "full" else 1),
            head=needed.head,
        )

    def _passes(self) -> int:
        """Products of a size that training does for one of the forward: itself, its input's gradient, its weight's when that trains."""
        return 3 if self.stage == "finetune" and self.lora is None else 2

    def _products(self) -> dict[str, float]:
        """Forward of one row through each product of a layer."""
        return {name: 2.0 * weights for name, weights in self.llm.products().items()}

    def _adapters(self, matrices: Sequence[str] = ("A", "B")) -> dict[str, float]:
        """Forward of one row through these matrices of the adapters of each product of a layer."""
        if self.lora is None or self.lora.rank is None:
            return {}
        # One side of every product is the decoder's width: of attention's and the MLP's last ones it comes out.
        width = self.llm.hidden_size
        sides = {name: (weights / width, width)[:: 1 if name in ("o", "down") else -1] for name, weights in self.llm.products().items()}
        return {
            name: sum(2.0 * self.lora.rank * side for side, matrix in zip(both, "AB", strict=True) if matrix in matrices)
            for name, both in sides.items()
            if f"{name}_proj" in self.lora.targets
        }

    def _layers(self, work: Work, last_rows: int, products: Mapping[str, float]) -> float:
        """These products of every layer, where the last one has `last_rows` of all that is no key or value."""
        keys_values = products.get("k", 0.0) + products.get("v", 0.0)
        whole = sum(products.values())
        return work.rows * (self.llm.num_hidden_layers - 1) * whole + work.rows * keys_values + last_rows * (whole - keys_values)

    def _attention(self) -> float:
        """Forward of one pair through all layers: a score and a share of the values, over every head's width."""
        return 4.0 * self.llm.num_hidden_layers * self.llm.num_attention_heads * self.llm.head_dim

    def _tower(self) -> float:
        """Forward of one image; the tower never trains."""
        tower = self.tower
        width, rows = tower.hidden_size, tower.rows
        embedding = 2.0 * tower.patches * width * tower.num_channels * tower.patch_size**2
        block = 2.0 * rows * (4 * width**2 + 2 * width * tower.intermediate_size) + 4.0 * width * rows**2
        return embedding + self.blocks * block
