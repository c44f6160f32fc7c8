"""The keys of LoRA (Hu et al. 2021, arXiv 2106.09685)."""

from typing import Literal, get_args

from pydantic import Field

from fastllava.config.section import Section

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""The linear layers of a decoder layer that adapters may lie on, in the order in which they are computed."""
_BITS = 16


class LoraConfig(Section):
    """Low-rank adapters on linear layers of the decoder, which train in its place; without a rank there are none."""

    rank: int | None = Field(default=None, ge=1, description="rows of A and columns of B, 128 in the recipe; without it there is no LoRA")
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="what an adapter adds is multiplied by alpha / rank; alpha is 2 x rank when left out",
    )
    dropout: float = Field(
        default=0.05, ge=0, lt=1, description="share of the values that go into an adapter which a step drops, in steps of 1 / 65,536"
    )
    targets: list[Target] = Field(
        default=list(TARGETS),
        min_length=1,
        description="linear layers of a decoder layer that get an adapter; all in the recipe",
    )

    @property
    def wanted(self) -> bool:
        """Whether there are adapters."""
        return self.rank is not None

    @property
    def draws(self) -> bool:
        """Whether a training step draws at random."""
        return self.wanted and self.dropped > 0

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        rank = self.rank or 1
        return (2.0 * rank if self.alpha is None else self.alpha) / rank

    @property
    def dropped(self) -> float:
        """The share that is dropped in fact: `dropout` in whole 65,536ths, which masks of 16 random bits can have."""
        return round(self.dropout * 2**_BITS) / 2**_BITS
