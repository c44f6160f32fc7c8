"""How a step's samples are dealt to ranks and micro-batches: properties of any answer, and cases small enough to check by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllava.data.balance import Cost, balance

ROWS = Cost(per_row=1, per_pair=0, per_image=0, per_supervised=0)


def dealt(n_tokens, budget, world, cost=None):
    rows = np.array(n_tokens, np.int32)
    return balance(rows, rows.astype(np.int64) if cost is None else np.array(cost, np.int64), budget, world)


def lists(micro_batches):
    return [[positions.tolist() for positions in ranks] for ranks in micro_batches]


steps = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 300), min_size=n, max_size=n),
        st.lists(st.integers(1, 10**15), min_size=n, max_size=n),
        st.integers(1, 1200),
        st.integers(1, 9),
    )
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_every_answer_is_whole_and_within_the_budget(step):
    n_tokens, cost, budget, world = step
    micro_batches = dealt(n_tokens, budget, world, cost)
    bins = [positions for ranks in micro_batches for positions in ranks]
    assert all(len(ranks) == world for ranks in micro_batches)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(n_tokens)))
    assert all((np.diff(positions) > 0).all() for positions in bins)
    rows = np.array(n_tokens)
    assert all(rows[positions].sum() <= budget or len(positions) == 1 for positions in bins)
    assert all(any(len(positions) for positions in ranks) for ranks in micro_batches), "no micro-batch without a sample"
    assert lists(dealt(n_tokens, budget, world, cost)) == lists(micro_batches), "the same answer whenever it is asked"


@settings(max_examples=60, deadline=None)
@given(steps)
def test_no_more_micro_batches_than_first_fit_needs(step):
    n_tokens, cost, budget, world = step
    space = []
    for n in sorted(n_tokens, reverse=True):
        first = next((b for b, left in enumerate(space) if n <= left), None)
        if first is None:
            space.append(budget - n)
        else:
            space[first] -= n
    assert len(dealt(n_tokens, budget, world, cost)) <= -(-len(space) // world)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40, unique=True), st.integers(1, 1200), st.integers(1, 9), st.randoms())
def test_samples_of_unlike_lengths_are_dealt_alike_in_any_order(n_tokens, budget, world, random):
    shuffled = random.sample(n_tokens, len(n_tokens))

    def bins(rows):
        return [[sorted(rows[i] for i in positions) for positions in ranks] for ranks in dealt(rows, budget, world, np.square(rows))]

    assert sorted(map(sorted, bins(n_tokens))) == sorted(map(sorted, bins(shuffled)))


def test_longest_first_by_hand():
    assert lists(dealt([3, 7, 5, 5], 10, 2)) == [[[0, 1], [2, 3]]]


def test_a_swap_finds_what_longest_first_does_not():
    # Longest first deals 7 + 5 + 4 and 6 + 6; a 7 for a 6 makes 15 and 13 of it, the best there is.
    (ranks,) = dealt([7, 6, 6, 5, 4], 100, 2)
    assert sorted(positions.tolist() for positions in ranks) == [[0, 2], [1, 3, 4]]


def test_first_fit_where_an_even_spread_has_no_space():
    # Longest first would have 6 alone, 5 + 4 together, and no place for the other 5.
    assert lists(dealt([6, 5, 4, 5], 10, 2, cost=[11, 10, 9, 1])) == [[[0, 2], [1, 3]]]


def test_first_fit_s_empty_rank_is_given_samples():
    # The four of one row would be spread first and leave no space for those of ten; first fit puts them together, beside nothing.
    (ranks,) = dealt([1, 1, 1, 1, 10, 10], 10, 4, cost=[10, 10, 10, 10, 1, 1])
    assert sorted(map(len, ranks)) == [1, 1, 2, 2]


def test_fewer_samples_than_ranks_leave_some_without():
    (ranks,) = dealt([5, 9], 10, 4)
    assert sorted(map(len, ranks)) == [0, 0, 1, 1]


def test_a_sample_longer_than_the_budget_is_alone():
    micro_batches = dealt([50, 3, 4], 10, 1)
    assert [0] in [positions for ranks in lists(micro_batches) for positions in ranks]
    assert len(micro_batches) == 2


def test_bins_of_like_weight_share_a_micro_batch_and_ranks_take_turns():
    # Four bins of one sample each: 9 and 8 run together, then 4 and 3 with the heavier one on the other rank.
    assert lists(dealt([4, 9, 3, 8], 9, 2)) == [[[1], [3]], [[2], [0]]]


def test_work_is_balanced_not_rows():
    # Two samples of 10 rows, one four times the work of the other three.
    (ranks,) = dealt([10, 10, 10, 10], 100, 2, cost=[40, 10, 10, 20])
    assert sorted(positions.tolist() for positions in ranks) == [[0], [1, 2, 3]]


def test_cost_by_hand():
    cost = Cost(per_row=10, per_pair=1, per_image=1000, per_supervised=7)
    assert cost.of([3, 4], [1, 0], [2, 0]).tolist() == [30 + 6 + 1000 + 14, 40 + 10]


def test_cost_is_exact_where_narrow_integers_are_not():
    lengths = np.array([2048], np.int32)
    exact = 38_654_705_664 * 2048 + 1_572_864 * (2048 * 2049 // 2) + 370 * 10**9
    assert Cost(38_654_705_664, 1_572_864, 370 * 10**9, 0).of(lengths, np.array([1], np.int8), np.array([0], np.int32)).tolist() == [exact]


@pytest.mark.parametrize("world", [2, 8])
def test_random_steps_are_even(world):
    rng = np.random.default_rng(world)
    for _ in range(20):
        rows = rng.integers(600, 2048, 128)
        for ranks in dealt(rows, 16384, world):
            loads = [rows[positions].sum() for positions in ranks]
            assert max(loads) <= 1.01 * np.mean(loads)
