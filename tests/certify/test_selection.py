"""Which steps and samples a certificate takes."""

import numpy as np
import pytest

from fastllava.certify.selection import choose
from fastllava.config import check_config
from fastllava.data.balance import Cost
from fastllava.data.plan import Plan, SampleLengths


def plan(n: int, texts: slice = slice(0, 0), **train) -> Plan:
    """A plan of n samples with lengths of their own; those in `texts` have no image."""
    rng = np.random.default_rng(0)
    images = np.ones(n, np.int8)
    images[texts] = 0
    rows = rng.integers(20, 200, n).astype(np.int32)
    lengths = SampleLengths(rows, (rows // 3).astype(np.int32), images, np.where(images > 0, rows, -rows).astype(np.int32))
    given = {
        "stage": "finetune",
        "output_dir": "run",
        "model": {"llm": "llm"},
        "data": {"records": "r.json", "shuffle": False},
        "train": {"global_batch": 16, "reference_micro_batch": 4, "micro_batch_tokens": 500, **train},
    }
    config = check_config(given)
    return Plan(lengths, config.data, config.train, Cost(10, 1, 100, 5))


def test_steps_are_spread_and_samples_follow_each_other():
    whole = plan(100)
    parts = choose(whole, 3, 5, seed=1)
    assert [part.step.index for part in parts] == [0, 2, 4]
    for part in parts:
        assert part.whole == len(whole.step(part.step.index).samples)
        expected = whole.step(part.step.index).samples[part.start : part.start + 5]
        assert part.step.samples.tolist() == expected.tolist()
        assert len(part.step.samples) == min(5, part.whole)
        placed = [int(position) for (positions,) in part.step.micro_batches for position in positions]
        assert sorted(placed) == list(range(len(part.step.samples)))
    assert len({part.start for part in (choose(whole, 1, 5, seed)[0] for seed in range(20))}) > 5, "the place is seeded"


def test_whole_steps_are_the_runs_own():
    whole = plan(100)
    for part in choose(whole, 99, 0, seed=1):
        assert part.step is whole.step(part.step.index)
        assert part.start == 0
    assert [part.step.index for part in choose(whole, 99, 0, seed=1)] == list(range(7))
    assert choose(whole, 2, 16, seed=1)[0].step is whole.step(0)


@pytest.mark.parametrize("loss_norm", ["token", "llava"])
def test_a_part_weighs_as_a_step_of_so_many_samples(loss_norm):
    whole = plan(100, loss_norm=loss_norm)
    (part,) = choose(whole, 1, 6, seed=3)
    n = whole.lengths.n_supervised[part.step.samples]
    cuts = [n] if loss_norm == "token" else [n[:4], n[4:]]
    np.testing.assert_allclose(part.step.weights, np.concatenate([np.full(len(cut), 1 / (len(cuts) * cut.sum())) for cut in cuts]))
    assert (part.step.weights * n).sum() == pytest.approx(1)


@pytest.mark.parametrize(("texts", "expected"), [((80, 90), [0, 3, 5]), ((0, 0), [0, 3]), ((0, 5), [0, 3]), ((0, 64), [0, 3, 4])])
def test_a_step_of_the_kind_that_is_missing_is_taken_besides(texts, expected):
    assert [part.step.index for part in choose(plan(100, slice(*texts)), 2, 4, seed=0)] == expected
    assert len(choose(plan(100, slice(*texts)), 1, 4, seed=0)) == 1
