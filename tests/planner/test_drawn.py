"""Drawn samples: counts, lengths and padding of LLaVA-1.5's sets, and content that agrees with them."""

import numpy as np
import pytest

from benches.lib.ours import plan_run
from fastllava.batch import IMAGE_ID, ImageSpec
from fastllava.config import check_config
from fastllava.data.balance import Cost
from fastllava.data.plan import Plan
from fastllava.planner import drawn
from fastllava.planner.sizes import SIZES

SPEC = ImageSpec(24, 576, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
COUNT = 4096


@pytest.fixture(scope="module")
def mix():
    return drawn.draw("finetune", COUNT, SPEC, 32000)


def test_the_mix_is_like_mix665k(mix) -> None:
    assert sum(source.records for source in drawn.MIX665K) == 665_298
    assert 1 - mix.has_image.mean() == pytest.approx(40_688 / 665_298, abs=0.01)
    assert mix.n_tokens.mean() == pytest.approx(855, rel=0.03)
    assert mix.n_tokens.max() == drawn.CAP
    assert mix.n_tokens[mix.has_image].min() > 576 + drawn.PREFIX
    assert mix.n_supervised.min() >= 1
    assert mix.n_supervised.sum() / mix.n_tokens.sum() == pytest.approx(0.15, abs=0.015)
    assert np.mean([len(turns) for turns in mix.turns]) > 3


def test_the_originals_micro_batches_of_it_carry_as_much_padding_as_is_known(mix) -> None:
    """29 to 33 of 100 rows are padding there."""
    config = check_config({"stage": "finetune", "output_dir": "o", "model": {"llm": "m"}, "data": {"records": "r"}})
    plan = Plan(mix, config.data, config.train, Cost(1, 0, 0, 0))
    rows = padded = 0
    for index in range(plan.steps_per_epoch):
        for cut in np.array_split(mix.n_tokens[plan.step(index).samples], 8):
            rows += cut.sum()
            padded += cut.max() * len(cut)
    assert 1 - rows / padded == pytest.approx(0.31, abs=0.03)


@pytest.mark.parametrize("stage", ["finetune", "pretrain"])
def test_content_agrees_with_the_lengths(stage: str) -> None:
    samples = drawn.draw(stage, 300, SPEC, 32000)
    for index in range(len(samples)):
        sample = samples.sample(index, 0.5)
        assert len(sample.ids) + len(sample.images) * (SPEC.patches - 1) == samples.n_tokens[index]
        assert (sample.ids == IMAGE_ID).sum() == len(sample.images) == samples.n_images[index] == samples.has_image[index]
        assert (sample.supervised[:, 1] - sample.supervised[:, 0]).sum() == samples.n_supervised[index]
        assert sample.supervised.min() > 0
        assert not any(IMAGE_ID in sample.ids[begin:end] for begin, end in sample.supervised)
        text = sample.ids[1:][sample.ids[1:] != IMAGE_ID]
        assert drawn.SPECIAL <= text.min() <= text.max() < 32000
        assert sample.weight == 0.5


def test_the_same_is_drawn_again() -> None:
    once, again, other = (drawn.draw("finetune", 64, SPEC, 32000, seed) for seed in (0, 0, 1))
    assert np.array_equal(again.n_tokens, once.n_tokens)
    assert not np.array_equal(other.n_tokens, once.n_tokens)
    for index in (0, 5):
        first, second = once.sample(index, 1.0), again.sample(index, 1.0)
        assert np.array_equal(first.ids, second.ids)
        assert all(np.array_equal(a, b) for a, b in zip(first.images, second.images, strict=True))


def test_captions_are_short() -> None:
    samples = drawn.draw("pretrain", 2000, SPEC, 32000)
    assert samples.has_image.all()
    assert samples.n_tokens.mean() == pytest.approx(600, abs=2)


def test_the_size_for_a_cpu_is_what_the_comparison_needs() -> None:
    """About 150 million parameters with a vocabulary of 32,000, and a tower of few FLOPs that gives as many patches as CLIP-L."""
    size = SIZES["150m"]
    llama, clip = size.llm, size.tower
    layer = 4 * llama.hidden_size**2 + 3 * llama.hidden_size * llama.intermediate_size
    parameters = llama.num_hidden_layers * layer + 2 * llama.vocab_size * llama.hidden_size
    assert parameters == pytest.approx(150e6, rel=0.05)
    assert llama.hidden_size >= 768
    assert (clip.patches, clip.num_hidden_layers) == (576, 24)
    run = plan_run("finetune", size, {"precision": "fp32"}, per_step=16)
    flops = run.accounting.model_flops(run.work(run.step(0)))
    assert 0 < flops.tower < 0.05 * flops.total
