"""The pieces of `fastllava bench gpu`, in the order of their worth on a GPU that is there for minutes only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benches.gpu_ceilings import ceiling_units, ceilings_in_words, measure_ceiling
from benches.gpu_context import Context
from benches.gpu_kernels import kernel_units, kernels_in_words, measure_kernel, split_kernel
from benches.gpu_profile import measure_profile, profile_units, profiles_in_words
from benches.gpu_sanitizer import sanitize, sanitizer_in_words, sanitizer_units
from benches.gpu_steps import (
    ablate_units,
    ablations_in_words,
    measure_ablation,
    measure_peers,
    measure_step,
    peer_units,
    peers_in_words,
    step_units,
    steps_in_words,
)
from benches.gpu_tests import run_tests, test_units, tests_in_words
from benches.gpu_tuning import measure_tuning, tuning_in_words, tuning_units
from benches.results import Row


def indivisible(unit: str) -> list[str]:
    """The `split` of units that are measured as a whole or not at all."""
    return []


@dataclass(frozen=True)
class Piece:
    """What is measured together, and how."""

    summary: str
    units: Callable[[str], list[str]]
    """Of a size, in their order: what has to be done for the piece to be whole."""
    measure: Callable[[Context, str], None]
    """One unit; its rows go to the context's notebook."""
    words: Callable[[Sequence[Row]], str]
    """What the rows so far say, in one line."""
    split: Callable[[str], list[str]] = indivisible
    """Smaller units to try in place of one that broke off."""


PIECES: Mapping[str, Piece] = {
    "ceilings": Piece("the machine, and what it gives at best", ceiling_units, measure_ceiling, ceilings_in_words),
    "tests": Piece("the tests that use a GPU, all failures collected", test_units, run_tests, tests_in_words),
    "kernels": Piece("every room and its peers", kernel_units, measure_kernel, kernels_in_words, split_kernel),
    "step": Piece("our steps", step_units, measure_step, steps_in_words),
    "peers": Piece("our steps and others' in turns", peer_units, measure_peers, peers_in_words),
    "ablate": Piece("every toggle", ablate_units, measure_ablation, ablations_in_words),
    "profile": Piece("where a step's time goes", profile_units, measure_profile, profiles_in_words),
    "tuning": Piece("the tables of kernel configurations", tuning_units, measure_tuning, tuning_in_words),
    "sanitizer": Piece("compute-sanitizer over the kernels", sanitizer_units, sanitize, sanitizer_in_words),
}
