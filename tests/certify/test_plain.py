"""Plain PyTorch's LLaVA against the trainer's, on samples that records seldom give: images cut in two, several, first and last."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fastllava.batch import IMAGE_ID
from fastllava.certify.plain import PlainLlava, collate
from fastllava.certify.variants import accumulate
from fastllava.config import check_config
from fastllava.data.loader import Sample, pack
from fastllava.model.execution import Execution
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava
from fastllava.train.stages import prepare_stage

MAX_TOKENS = 16


def sample(ids: Sequence[int], *supervised: tuple[int, int], weight: float = 0.3) -> Sample:
    rng = np.random.default_rng(len(ids))
    images = [rng.integers(0, 256, (3, 28, 28), dtype=np.uint8) for _ in range(list(ids).count(IMAGE_ID))]
    return Sample(np.array(ids, np.int32), np.array(supervised, np.int32).reshape(-1, 2), images, weight)


CASES = {
    "image cut in two": [sample([1, *range(10, 23), IMAGE_ID, 5], (3, 9))],
    "several images": [sample([1, IMAGE_ID, 7, IMAGE_ID, 8, 9, 10], (5, 7)), sample([1, 20, 21, 22], (2, 4), weight=0.7)],
    "image first and last": [sample([IMAGE_ID, 30, 31], (1, 3)), sample([1, 40, 41, IMAGE_ID], (1, 3)), sample([1, 3, 2], (0, 3))],
    "text cut": [sample([1, *range(10, 40)], (5, 31)), sample([1, IMAGE_ID, 6, 2], (2, 4))],
    "no image": [sample([1, 9, 8, 7], (1, 3)), sample([1, 9], (1, 2))],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_loss_and_gradients_equal_the_trainers(case, stage, settings):
    config = check_config(settings(stage))
    model = load_llava(config.model, Execution(reference_ops(), torch.float32), 0)
    plain = PlainLlava(model, config.stage, torch.float32, torch.device("cpu"), MAX_TOKENS)
    expected = accumulate(plain.trained(), [lambda: plain.loss(collate(CASES[case], 28))])
    trained = prepare_stage(model, config)
    found = accumulate(trained, [lambda: model(pack(CASES[case], model.spec, MAX_TOKENS))])
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys() == trained.keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_gradients_gathered_on_the_host_are_those_that_backward_leaves(settings):
    config = check_config(settings())
    model = load_llava(config.model, Execution(reference_ops(), torch.float32), 0)
    trained = prepare_stage(model, config)
    batches = [pack(CASES[case], model.spec, MAX_TOKENS) for case in ("several images", "no image", "text cut")]
    loss, gathered = accumulate(trained, [lambda batch=batch: model(batch) for batch in batches])
    losses = [model(batch) for batch in batches]
    for part in losses:
        part.backward()
    assert loss == pytest.approx(torch.stack(losses).sum().item())
    assert gathered.keys() == trained.keys()
    assert all(torch.equal(gathered[name], parameter.grad) for name, parameter in trained.items())


def test_the_weights_are_shared_and_none_is_changed(settings):
    config = check_config(settings())
    model = load_llava(config.model, Execution(reference_ops(), torch.float32), 0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    plain = PlainLlava(model, config.stage, torch.float32, torch.device("cpu"), MAX_TOKENS)
    accumulate(plain.trained(), [lambda: plain.loss(collate(CASES["several images"], 28))])
    own = dict(model.named_parameters())
    assert all(torch.equal(before[name], weight) for name, weight in own.items())
    assert all(parameter.data_ptr() == own[name].data_ptr() for name, parameter in plain.trained().items())
    assert all(parameter.grad is None for parameter in [*own.values(), *plain.trained().values()])
