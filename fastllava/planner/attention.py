"""How long attention takes, which reaches less of a GPU's peak than products do: by version, pass, length and GPU, as published.

No figure is for packed samples of mixed lengths, and none was measured here. Each is of samples of one length, causal, heads 128 wide.
The tower's attention, 0.2 % of a step's operations, is counted among its products.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fastllava.errors import UserError
from fastllava.model.decoders import DecoderConfig
from fastllava.planner.gpus import Gpu


@dataclass(frozen=True)
class Published:
    """What one version of FlashAttention reaches on GPUs of one generation, in 10^12 operations a second by rows of a sample.

    A pair of rows takes 4 operations a head's width forward and 10 backward, where the scores are formed again.
    """

    forward: Mapping[int, float]
    backward: Mapping[int, float]
    one_order: float
    """The share of `backward` that is left where additions have one order."""
    peak: float
    """The peak of the GPU that this is of."""
    source: str


_FA3_ON_HOPPER = Published(
    forward={512: 292, 1024: 364, 2048: 560, 4096: 667, 8192: 685},
    backward={1024: 182, 2048: 316, 4096: 444, 8192: 539},
    one_order=474 / 575,
    peak=989e12,
    source="H100: times of 4 x 48 heads, tritonbench 1267; 512 rows, arXiv 2407.08608, figure 5; one order, flash-attention 1893",
)
PUBLISHED: Mapping[tuple[str, int], Published] = {
    ("varlen", 9): Published(
        forward={512: 191, 1024: 260, 2048: 298, 4096: 319, 8192: 306},
        backward={8192: 166},
        one_order=1.0,
        peak=989e12,
        source="H100: forward, arXiv 2407.08608, figure 5; at 8192 rows and backward, flash-attention 1893; of one order nothing was found",
    ),
    ("fa3", 9): _FA3_ON_HOPPER,
    # "Very similar" on a GH200 (torchtitan 4413); no figures.
    ("fa4", 9): _FA3_ON_HOPPER,
    ("varlen", 8): Published(
        forward={512: 156, 16384: 228},
        backward={512: 135, 16384: 197},
        one_order=1.0,
        peak=312e12,
        source="A100: 50 to 73 % of the peak forward, 63 % backward, arXiv 2307.08691; the least at 512 rows is assumed; of one order "
        "nothing was found",
    ),
}
"""By implementation of `kernels.attention` and generation of the GPU (compute capability 8.x, 9.x)."""


def implementation_of(wanted: str, gpu: Gpu) -> str:
    """The implementation that a plan counts with: the one asked for by name, else PyTorch's own, which every machine has.

    Raises UserError for one that does not run on that GPU.
    """
    if wanted in ("fa3", "fa4") and (wanted, gpu.generation) not in PUBLISHED:
        found = f"{gpu.name}, of compute capability {gpu.generation}.x"
        raise UserError(f"kernels.attention: '{wanted}' cannot run on {found}; write kernels.attention=varlen")
    return wanted if (wanted, gpu.generation) in PUBLISHED else "varlen"


def seconds(
    llm: DecoderConfig, lengths: ArrayLike, gpu: Gpu, implementation: str, forwards: int = 1, backward: bool = True, one_order: bool = False
) -> float:
    """Seconds of the decoder's attention over samples of these lengths [samples] on one GPU, all its layers.

    `forwards`: how often forward is done, twice where backward does it again.
    """
    found = PUBLISHED[implementation, gpu.generation]
    rows = np.asarray(lengths, dtype=np.float64)
    operations = rows * (rows + 1) / 2 * llm.num_hidden_layers * llm.num_attention_heads * llm.attention_width
    scale = 1e12 * gpu.peak / found.peak
    taken = forwards * 4 * (operations / reached(found.forward, rows)).sum()
    if backward:
        taken += 10 * (operations / reached(found.backward, rows)).sum() / (found.one_order if one_order else 1.0)
    return float(taken / scale)


def reached(figures: Mapping[int, float], rows: Sequence[float] | np.ndarray) -> np.ndarray:
    """The figure at each number of rows: between two published ones by the logarithm of the rows, beyond the last as at the last.

    Below the first it falls with the rows, as of a kernel's tiles ever fewer pairs are wanted; where only a long length is
    published, from 1024 rows on down.
    """
    known = sorted(figures)
    values = np.interp(np.log(rows), np.log(known), [figures[each] for each in known])
    return values * np.minimum(1.0, np.asarray(rows) / min(known[0], 1024))
