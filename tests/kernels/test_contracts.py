"""What the references promise and no distance shows: zero gradients in place of none, cut patches, fp32 logits."""

import pytest
import torch
from judging import rounded
from truths import truth_of

from fastllava_kernels import rooms
from fastllava_kernels.room import REFERENCE


@pytest.mark.parametrize("case", ["no image", "one token"])
def test_projector_without_images_has_zero_gradients_not_none(case: str) -> None:
    args = rounded(truth_of("projector_splice").CASES[case], torch.float32, torch.float32)
    rooms()["projector_splice"].implementations[REFERENCE].function(*args).sum().backward()
    for weight, bias in args[1]:
        assert torch.equal(weight.grad, torch.zeros_like(weight))
        assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_loss_without_supervised_rows_is_zero_with_zero_gradients() -> None:
    args = rounded(truth_of("masked_linear_cross_entropy").CASES["none supervised"], torch.float32, torch.float32)
    loss = rooms()["masked_linear_cross_entropy"].implementations[REFERENCE].function(*args)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(args[0].grad, torch.zeros_like(args[0]))
    assert torch.equal(args[1].grad, torch.zeros_like(args[1]))


def test_patch_that_is_cut_gets_no_gradient() -> None:
    args = rounded(truth_of("projector_splice").CASES["patches cut away"], torch.float32, torch.float32)
    rooms()["projector_splice"].implementations[REFERENCE].function(*args).sum().backward()
    features = args[0].grad
    assert torch.equal(features[2:], torch.zeros_like(features[2:]))
    assert features[:2].abs().min() > 0


def test_cross_entropy_is_taken_in_fp32_of_bf16_logits() -> None:
    """One logit of 100 beside many of 0: in bf16 the loss of a 0 would lose its fraction."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[100.0], [1.0], [0.0]], dtype=torch.bfloat16)
    row, target, share = torch.zeros(1, dtype=torch.int32), torch.tensor([1]), torch.ones(1)
    loss = rooms()["masked_linear_cross_entropy"].implementations[REFERENCE].function(hidden, weight, row, target, share)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(99.0, abs=1e-5)
