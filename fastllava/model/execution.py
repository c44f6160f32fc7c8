"""How a model computes: everything about a run that is not its weights, its shapes or its data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastllava.config import Compile, Config, Fp8, Recompute, Rows
from fastllava.model.ops import Ops

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""By `train.precision`, and by `optim.master` for what trains."""


@dataclass(frozen=True)
class Execution:
    """The choices that a model is built with. Only `dtype` and `fp8` change the numerics by more than the order of additions."""

    ops: Ops
    dtype: torch.dtype
    """Computes in this dtype, whatever dtype a weight is kept in."""
    recompute: Recompute = "none"
    """What of each decoder layer backward computes again."""
    last_layer: Rows = "supervised"
    """The rows for which the loss has the decoder's last layer computed."""
    compile: Compile = "off"
    """What becomes graphs of torch.compile; they are compiled at the first micro-batch."""
    fp8: Fp8 = "off"
    """torchao's recipe for the products of the decoder's layers."""
    backend: str | Callable[..., Any] = "inductor"
    """The backend of torch.compile."""

    @classmethod
    def of(cls, config: Config, ops: Ops) -> "Execution":
        """The execution that the run of `config` asks for, with the implementations `ops`."""
        train = config.train
        return cls(ops, COMPUTE_DTYPE[train.precision], train.recompute, train.last_layer, train.compile, train.fp8)
