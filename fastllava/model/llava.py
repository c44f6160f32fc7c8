"""LLaVA: tower, projector, splice, decoder and masked loss on one packed batch.

Shape letters: T packed rows, M supervised rows, I images, P patches an image, C tower width, D decoder width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllava.batch import Batch
from fastllava.errors import UserError
from fastllava.model.architecture import Architecture
from fastllava.model.compiled import Graph, eager
from fastllava.model.decoders import Decoder
from fastllava.model.execution import Execution
from fastllava.model.indices import check_on_host
from fastllava.model.ops import modules_by_room
from fastllava.model.projectors import Projector
from fastllava.model.towers import Tower
from fastllava_kernels.indices import inside, nan_unless_bounds, or_else
from fastllava_kernels.room import SEPARATE


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """fp32 [I, 3, H, W] of uint8 pixels: `(pixels / 255 - mean) / std`; mean, std fp32 [3]. Bit for bit transformers' slow processors'."""
    return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]


class Llava(nn.Module):
    """The whole model, as `build.build_llava` puts it together.

    Which parameters train, and the dtype each is kept in, is up to the caller; it computes in `dtype`.
    """

    def __init__(
        self,
        llm: Decoder,
        tower: Tower,
        projector: Projector,
        origin: Architecture,
        execution: Execution,
        projector_source: str = "fresh",
        graph: Graph = eager,
    ) -> None:
        super().__init__()
        self.llm, self.tower, self.projector = llm, tower, projector
        self.origin: Any = origin
        """Its architecture; `weights.Origin`, which says more, where it was read from folders."""
        self.execution = execution
        self.spec, self.dtype = origin.spec, execution.dtype
        self.chosen = execution.ops.chosen
        """The implementation of every room, whether a module of this model uses it or not."""
        self.fused = projector.chain() is not None and self.chosen["projector_splice"] != SEPARATE
        """Whether projector and splice are one op."""
        self.ops = execution.ops.only("projector_splice" if self.fused else "splice", "masked_linear_cross_entropy")
        self.projector_source = projector_source
        """The file or folder the projector was read from, or "fresh"."""
        self._compute: Callable[[Llava, Batch], Tensor] = graph(forward_batch)
        spec = origin.spec
        # No buffer, so that no cast of the module rounds it.
        self._mean_std = torch.tensor((spec.mean, spec.std), dtype=torch.float32, device="cpu")

    def forward(self, batch: Batch) -> Tensor:
        """fp32 scalar `sum_i weights_i * CE_i` over the batch's supervised rows; 0 with zero gradients when there are none.

        Nothing here waits for the device, apart from a reference implementation that says so.
        Raises UserError when a sample is longer than the decoder's attention window, and, of a batch on the CPU, for an index
        that leads nowhere; on a GPU the loss is NaN then.
        """
        self._prepare(batch)
        return self._compute(self, batch)

    def kernels(self) -> dict[str, dict[str, Any]]:
        """By room, for the rooms in use: the `implementation`, and how many `modules` of each part ("llm", "tower", ...) hold it."""
        parts = {"llm": self.llm.modules(), "tower": set(self.tower.modules()) - self.tower.idle_modules(), "llava": [self]}
        if not self.fused:
            parts["projector"] = self.projector.modules()
        counts = {part: modules_by_room(modules) for part, modules in parts.items()}
        return {
            room: {"implementation": implementation, "modules": {part: count[room] for part, count in counts.items() if room in count}}
            for room, implementation in sorted(self.chosen.items())
            if any(room in count for count in counts.values())
        }

    def logits(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """fp32 [T, V]: the logits of every row; [M, V] of the `rows`, int64 [M], when given.

        Graphs are made of the loss: of this one layer by layer only, with `train.compile=layer`.
        """
        self._prepare(batch)
        return F.linear(self.hidden(batch, rows), self.llm.head_weight.to(self.dtype)).float()

    def features(self, pixels: Tensor) -> Tensor:
        """[I, P, C] in `dtype`: the tower's features of uint8 pixels [I, 3, H, W]. No gradient when the whole tower is frozen."""
        trained = any(parameter.requires_grad for parameter in self.tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            # A text-only batch costs nothing here; a tower that trains still gets its zero gradients.
            if not len(pixels) and not trained:
                return torch.zeros(0, self.tower.config.patches, self.tower.config.hidden_size, dtype=self.dtype, device=pixels.device)
            self._place_constants(pixels.device)
            return self.tower(normalise(pixels, *self._mean_std).to(self.dtype))

    def _prepare(self, batch: Batch) -> None:
        """What cannot be part of a compiled graph: checks, and constants moved to the device."""
        check_on_host(batch, self.llm.config.vocab_size)
        self._place_constants(batch.pixels.device)
        self.llm.place_constants(batch.token_ids.device)
        window = self.llm.config.window
        if window is not None and batch.max_seqlen > window:
            raise UserError(
                f"data.max_tokens: a sample of {batch.max_seqlen} rows is longer than this LLM's attention window of {window}; "
                f"write data.max_tokens={window}"
            )

    def _place_constants(self, device: torch.device) -> None:
        if self._mean_std.device != device:
            self._mean_std = self._mean_std.to(device)

    def hidden(self, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """[T, D] in `dtype`: the hidden states after the final norm; [M, D] of the rows `wanted`, int64 [M], when given."""
        rows = batch.position_ids, batch.cu_seqlens, batch.max_seqlen
        return self.llm(self._spliced(batch), *rows, self.execution.recompute, wanted, batch.row_keys)

    def _spliced(self, batch: Batch) -> Tensor:
        """[T, D]: images' tokens and embedded text, each in its row."""
        features_IPC = self.features(batch.pixels)
        text_and_rows = self.llm.embedding_weight, batch.token_ids, batch.text_rows, batch.patch_rows
        if self.fused:
            return self.ops.projector_splice(features_IPC.flatten(0, 1), self.projector.chain(), *text_and_rows)
        return self.ops.splice(self.projector(features_IPC), *text_and_rows)


def forward_batch(model: Llava, batch: Batch) -> Tensor:
    """The loss of `Llava.forward`, which prepares what this needs."""
    if model.execution.last_layer == "all":
        hidden, rows = model.hidden(batch), batch.supervised_rows
    else:
        # What is no row is not followed; the loss makes NaN of it.
        total, supervised = batch.token_ids.shape[0], batch.supervised_rows
        hidden = model.hidden(batch, or_else(supervised, total, 0))
        rows = torch.arange(hidden.shape[0], dtype=torch.int32, device=hidden.device).where(inside(supervised, total), -1)
    # Samples that are not those of the batch are a loss of NaN.
    weights = batch.weights + nan_unless_bounds(batch.cu_seqlens, batch.token_ids.shape[0], batch.max_seqlen)
    return model.ops.masked_linear_cross_entropy(hidden, model.llm.head_weight, rows, batch.targets, weights)
