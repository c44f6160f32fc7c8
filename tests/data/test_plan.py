"""The plan: which samples form a step, their packing and weights."""

import json

import numpy as np
import pytest
import torch

from fastllava.config import check_config
from fastllava.data.balance import Cost
from fastllava.data.plan import Plan, SampleLengths, group_by_modality, held_out_of
from fastllava.errors import UserError

COST = Cost(per_row=400, per_pair=1, per_image=9000, per_supervised=30)


def make_plan(n=103, seed=1, world=1, **train):
    rng = np.random.default_rng(seed)
    n_tokens, n_supervised = rng.integers(10, 900, n).astype(np.int32), rng.integers(1, 60, n).astype(np.int32)
    length_key = (rng.integers(1, 200, n) * rng.choice([-1, 1], n)).astype(np.int32)
    lengths = SampleLengths(n_tokens, n_supervised, (length_key > 0).astype(np.int8), length_key)
    data = {"records": "r", **train.pop("data", {})}
    config = check_config(
        {
            "stage": "finetune",
            "output_dir": "o",
            "model": {"llm": "l"},
            "data": data,
            "train": {"global_batch": 16, "reference_micro_batch": 4, "micro_batch_tokens": 2000, **train},
        }
    )
    return Plan(lengths, config.data, config.train, COST, world)


def test_group_by_modality_is_the_originals_order(each_golden):
    expected = json.loads((each_golden / "sampler.json").read_text())
    generator = torch.Generator().manual_seed(expected["seed"])
    order = group_by_modality(expected["lengths"], expected["batch_size"], expected["world"], generator)
    assert order == expected["indices"]


@pytest.mark.parametrize("sign", [1, -1])
def test_group_by_modality_with_one_modality_holds_each_sample_once(sign):
    order = group_by_modality([sign * n for n in range(1, 38)], 4, 2, torch.Generator().manual_seed(3))
    assert sorted(order) == list(range(37))


@pytest.mark.parametrize("data", [{}, {"group_by_modality": False}, {"shuffle": False}])
def test_an_epoch_holds_each_sample_once_and_steps_are_whole(data):
    plan = make_plan(data=data, epochs=2)
    sizes = [len(plan.step(k).samples) for k in range(plan.n_steps)]
    assert sizes == [16, 16, 16, 16, 16, 16, 7] * 2
    for first in (0, 7):
        seen = np.concatenate([plan.step(k).samples for k in range(first, first + 7)])
        assert sorted(seen.tolist()) == list(range(103))


def test_steps_are_of_one_modality_but_for_the_left_over():
    plan = make_plan()
    mixed = [len(set(np.sign(plan.lengths.length_key[plan.step(k).samples]).tolist())) for k in range(plan.n_steps)]
    # 103 samples in two modalities: all whole groups are pure, what is left of both comes last.
    assert mixed[:4] == [1, 1, 1, 1]


def test_a_step_depends_on_its_number_alone():
    forward, backward = make_plan(epochs=3), make_plan(epochs=3)
    for k in reversed(range(backward.n_steps)):
        ours, theirs = backward.step(k), forward.step(k)
        assert np.array_equal(ours.samples, theirs.samples)
        assert len(ours.micro_batches) == len(theirs.micro_batches)
    assert not np.array_equal(forward.step(0).samples, forward.step(7).samples), "epochs are shuffled apart"


def test_another_seed_is_another_order():
    one, other = make_plan(), make_plan()
    other.train = other.train.model_copy(update={"seed": 7})
    assert not np.array_equal(one.step(0).samples, other.step(0).samples)


def test_file_order():
    plan = make_plan(data={"shuffle": False})
    assert plan.step(1).samples.tolist() == list(range(16, 32))


@pytest.mark.parametrize("world", [1, 2, 3, 64])
@pytest.mark.parametrize("budget", [1, 500, 2000, 10**6])
def test_micro_batches_hold_each_sample_once_within_the_budget(budget, world):
    plan = make_plan(micro_batch_tokens=budget, world=world)
    for k in range(plan.n_steps):
        step = plan.step(k)
        assert {len(ranks) for ranks in step.micro_batches} == {world}
        bins = [positions for ranks in step.micro_batches for positions in ranks]
        assert sorted(np.concatenate(bins).tolist()) == list(range(len(step.samples)))
        tokens = plan.lengths.n_tokens[step.samples]
        assert all(tokens[positions].sum() <= budget or len(positions) == 1 for positions in bins)
        assert all((np.diff(positions) > 0).all() for positions in bins)


def test_the_samples_and_weights_of_a_step_do_not_depend_on_the_world():
    alone = make_plan()
    for world in (2, 8, 64):
        plan = make_plan(world=world)
        assert plan.n_steps == alone.n_steps
        for k in range(plan.n_steps):
            assert np.array_equal(plan.step(k).samples, alone.step(k).samples)
            assert np.array_equal(plan.step(k).weights, alone.step(k).weights)


def test_weights_of_loss_norm_token_sum_to_one_over_the_step():
    plan = make_plan()
    for k in range(plan.n_steps):
        step = plan.step(k)
        assert len(set(step.weights.tolist())) == 1
        assert np.dot(step.weights, plan.lengths.n_supervised[step.samples]) == pytest.approx(1.0, rel=1e-12)


def test_weights_of_loss_norm_llava_are_the_mean_of_the_micro_batches_means():
    plan = make_plan(loss_norm="llava")
    last = plan.step(plan.n_steps - 1)  # 7 samples: micro-batches of 4 and 3
    supervised = plan.lengths.n_supervised[last.samples]
    losses = np.random.default_rng(0).random(7)  # mean loss of each sample's tokens
    first = (losses[:4] * supervised[:4]).sum() / supervised[:4].sum()
    second = (losses[4:] * supervised[4:]).sum() / supervised[4:].sum()
    assert np.dot(last.weights, losses * supervised) == pytest.approx((first + second) / 2, rel=1e-12)


def test_max_steps_replaces_epochs():
    assert make_plan(max_steps=30).n_steps == 30
    assert len(make_plan(max_steps=30).step(29).samples) == 16


def test_no_sample_is_an_error_that_names_the_key():
    with pytest.raises(UserError, match=r"data\.records"):
        make_plan(n=0)


@pytest.mark.parametrize("norm", ["token", "llava"])
def test_a_step_without_a_sample_weighs_what_is_left(norm):
    plan = make_plan(loss_norm=norm, epochs=2)
    whole, n = plan.step(3), plan.lengths.n_supervised
    gone = whole.samples[4:9].tolist()
    plan.leave_out(dict.fromkeys(gone, 3))
    step = plan.step(3)
    assert step.samples.tolist() == [i for i in whole.samples.tolist() if i not in gone]
    cuts = [whole.samples] if norm == "token" else [whole.samples[k : k + 4] for k in range(0, 16, 4)]
    left = [cut for cut in ([i for i in part.tolist() if i not in gone] for part in cuts) if cut]
    expected = {i: 1 / (len(left) * n[cut].sum()) for cut in left for i in cut}
    np.testing.assert_allclose(step.weights, [expected[i] for i in step.samples.tolist()])
    counted = sum(len(plan.step(k).samples) for k in range(9))
    assert sum(map(len, plan.samples_of(9))) == counted
    plan.leave_out(dict.fromkeys(whole.samples.tolist(), 3))
    assert not len(plan.step(3).samples)
    assert len(plan.step(3).micro_batches) == 1


@pytest.mark.parametrize(
    ("count", "share", "size"), [(100, 0.1, 10), (100, 0.999, 99), (100, 1e-9, 1), (2, 0.5, 1), (1, 0.5, 0), (100, None, 0)]
)
def test_a_share_is_one_sample_at_least_and_never_all(count, share, size):
    found = held_out_of(count, share, 7)
    assert len(set(found.tolist())) == len(found) == size
    assert found.tolist() == sorted(found.tolist()) == held_out_of(count, share, 7).tolist()
    assert all(0 <= i < count for i in found.tolist())


def test_another_seed_holds_out_others_and_the_draw_is_not_the_epoch_s():
    one, other = (held_out_of(1000, 0.3, seed).tolist() for seed in (1, 2))
    assert one != other
    plan = make_plan(1000, data={"group_by_modality": False}, seed=1)
    assert set(one) != set(np.concatenate([plan.step(k).samples for k in range(plan.n_steps)])[:300].tolist())


@pytest.mark.parametrize("data", [{}, {"group_by_modality": False}, {"shuffle": False}])
def test_what_is_not_held_out_is_planned_as_if_it_were_all_there_is(data):
    whole = make_plan(data=data, epochs=2, loss_norm="llava")
    out = held_out_of(103, 0.25, 3)
    kept = np.setdiff1d(np.arange(103), out)
    of_rest = Plan(SampleLengths.of(whole.lengths, kept), whole.data, whole.train, COST, 3)
    plan = Plan(whole.lengths, whole.data, whole.train, COST, 3, held_out=out)
    assert (plan.n_steps, plan.n_samples) == (of_rest.n_steps, of_rest.n_samples)
    for k in range(plan.n_steps):
        one, other = plan.step(k), of_rest.step(k)
        assert one.samples.tolist() == kept[other.samples].tolist()
        assert one.weights.tolist() == other.weights.tolist()
        assert [[r.tolist() for r in m] for m in one.micro_batches] == [[r.tolist() for r in m] for m in other.micro_batches]
    for steps in (3, plan.steps_per_epoch, plan.n_steps):
        assert [part.tolist() for part in plan.samples_of(steps)] == [kept[part].tolist() for part in of_rest.samples_of(steps)]
