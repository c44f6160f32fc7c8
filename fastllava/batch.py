"""The only contract between data and model: one packed micro-batch, laid out wholly on the host.

Shape letters: T packed rows (text tokens and images' tokens), S samples, I images, P rows per image, M supervised rows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

IMAGE_ID = -200
"""Marks the image in a sample's ids, as in the original (llava/constants.py, IMAGE_TOKEN_INDEX)."""


@dataclass(frozen=True)
class ImageSpec:
    """What the vision tower wants to see; read from its folder."""

    size: int
    """Side of the square input, pixels."""
    patches: int
    """Rows per image in the packed sequence: the tower's patches, or the tokens that the projector makes of them."""
    mean: tuple[float, float, float]
    """Per-channel mean of RGB in [0, 1]; also the colour that `pad` pads with."""
    std: tuple[float, float, float]
    """Per-channel standard deviation of RGB in [0, 1]."""
    crops: bool = True
    """Whether image policy `square` cuts the centre out of an image that is not square, as for CLIP; else it squeezes the whole in."""
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    """How images are resized."""

    def written(self) -> dict[str, Any]:
        """It as JSON. What is as for CLIP is left out where that was all there was, so that sets of records prepared then stay good."""
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in given.items() if (key, value) not in (("crops", True), ("resample", "bicubic"))}

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "ImageSpec":
        """The one that was `written`."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        return cls(**values)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: S samples one after another in T rows, no padding between or after them.

    A batch without images (I = 0) or without supervised rows (M = 0) is normal.
    """

    token_ids: Tensor
    """int64 [T]: token ids; 0 on the rows of patches, which are never looked up."""
    position_ids: Tensor
    """int64 [T]: 0, 1, ... in each sample."""
    cu_seqlens: Tensor
    """int32 [S+1]: the row where each sample starts, then T."""
    max_seqlen: int
    """Rows of the longest sample."""
    pixels: Tensor
    """uint8 [I, 3, H, W]: RGB, not normalised."""
    patch_rows: Tensor
    """int32 [I*P]: the row of each token of the images; T for one that the cut at `data.max_tokens` took away."""
    text_rows: Tensor
    """int32 [T - patches kept]: the rows that hold text tokens, ascending."""
    supervised_rows: Tensor
    """int32 [M]: the rows whose next token is supervised, ascending."""
    targets: Tensor
    """int64 [M]: that next token."""
    weights: Tensor
    """fp32 [M]: the weight of each row's cross-entropy in the step's loss (design: `loss_norm`)."""
    row_keys: Tensor | None = None
    """int64 [T]: what is drawn at random for a row is a function of this and of the place in the model; None where nothing is."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`; the copy does not block when they are pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory. `DataLoader(pin_memory=True)` calls this."""
        return self._map(Tensor.pin_memory)

    def share_memory(self) -> "Batch":
        """The same batch in memory that another process can map. Raises RuntimeError when there is no space for it."""
        return self._map(lambda tensor: tensor.share_memory_() if tensor.numel() else tensor)

    def _map(self, change) -> "Batch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})
