"""Which samples a certificate looks at: some of each of a few steps of the run's own plan."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastllava.data.plan import Plan, Step

_SEARCHED = 512
"""Steps that are looked through for samples of a kind that is missing; a millisecond each."""


@dataclass(frozen=True)
class Part:
    """Some samples of a step, as a step of their own."""

    step: Step
    start: int
    """Position of the first of them in the whole step."""
    whole: int
    """Samples of the whole step."""


@dataclass(frozen=True)
class Selection:
    """What the loader takes for a plan: steps numbered from 0, whatever their numbers in the run."""

    steps: tuple[Step, ...]

    @property
    def n_steps(self) -> int:
        """How many."""
        return len(self.steps)

    def step(self, index: int) -> Step:
        """The one at place `index`."""
        return self.steps[index]


def choose(plan: Plan, steps: int, samples: int, seed: int) -> list[Part]:
    """`steps` steps spread evenly over the plan from its first on; of each `samples` consecutive ones from a seeded place.

    Where they all have images, or all have none, and the set has samples of the other kind, one step that has such is taken besides,
    unless a single step is asked for. `samples` 0 takes whole steps; a plan of fewer steps, or a step of fewer samples, is taken whole.
    """
    indices = sorted({place * plan.n_steps // steps for place in range(steps)})
    if steps > 1:
        indices = sorted({*indices, *_other_kind(plan, indices)})
    return [_part(plan, index, samples, seed) for index in indices]


def _other_kind(plan: Plan, indices: list[int]) -> Iterator[int]:
    """A step with samples of a kind that no step of `indices` has: with an image, or without. None when the next steps have none."""
    shows = plan.lengths.n_images > 0
    for kind in (True, False):
        if kind in shows and not any(kind in shows[plan.step(index).samples] for index in indices):
            later = range(indices[-1] + 1, min(indices[-1] + 1 + _SEARCHED, plan.n_steps))
            found = next((index for index in later if kind in shows[plan.step(index).samples]), None)
            if found is not None:
                yield found


def _part(plan: Plan, index: int, samples: int, seed: int) -> Part:
    step = plan.step(index)
    whole = len(step.samples)
    if not samples or samples >= whole:
        return Part(step, 0, whole)
    start = int(np.random.default_rng([seed, index]).integers(whole - samples + 1))
    return Part(plan.part(index, start, samples), start, whole)
