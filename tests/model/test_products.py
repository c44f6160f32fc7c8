"""Products of linear layers: what autograd makes of them plainly, nearer to fp64, with fewer bytes moved and one cast a step."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastllava.model.layers import Linear, multiply
from fastllava.model.products import accumulation, linear

WIDTHS = (48, 16, 16)


def plainly(x, weight, bias):
    """Another function than `linear`, so the layers leave these products to autograd."""
    return linear(x, weight, bias)


def layers_of(product=linear, dtype=torch.float32, bias=True, frozen=False):
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleList(Linear(32, width, bias, product) for width in WIDTHS)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return layers.to(dtype).requires_grad_(not frozen)


def micro_batches(count, dtype, rows=(40, 56, 24, 8)):
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        x = torch.randn(rows[number % 4], 32, generator=generator)
        yield x.to(dtype).requires_grad_(), [torch.randn(len(x), width, generator=generator).to(dtype) for width in WIDTHS]


def trained(layers, dtype, count=4, wide=None):
    """Gradients of the inputs, and of the parameters over all micro-batches; computed in `wide` where that is given."""
    inputs = []
    with accumulation():
        for x, upstream in micro_batches(count, dtype):
            given = x if wide is None else x.detach().to(wide).requires_grad_()
            torch.autograd.backward(multiply(given, *layers), [d.to(given.dtype) for d in upstream])
            inputs.append(given.grad)
    return inputs, {name: p.grad for name, p in layers.named_parameters()}


def distance(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bias", "frozen"), [(True, False), (False, False), (False, True)])
def test_gradients_are_autograds(dtype, bias, frozen):
    """In one dtype they differ by the order of additions alone."""
    found = trained(layers_of(dtype=dtype, bias=bias, frozen=frozen), dtype)
    expected = trained(layers_of(plainly, dtype, bias, frozen), dtype)
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name, gradient in expected[1].items():
        assert (gradient is None) == frozen
        if not frozen:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)


def test_bf16_gradients_of_fp32_weights_are_nearer_to_fp64():
    """Those of the weights as near as fp32 sums are, with no rounding to bf16 before they are added; those of inputs about as before."""
    found, plain = trained(layers_of(), torch.bfloat16), trained(layers_of(plainly), torch.bfloat16)
    # What bf16 computes with, exactly: weights and inputs are rounded, sums are not.
    truth = trained(layers_of(plainly, torch.float32).bfloat16().double(), torch.bfloat16, wide=torch.float64)
    for name, exact in truth[1].items():
        assert found[1][name].dtype == torch.float32
        assert distance(found[1][name], exact) < 1e-6 < 1e-3 < distance(plain[1][name], exact), name
    for one, other, exact in zip(found[0], plain[0], truth[0], strict=True):
        assert distance(one, exact) < 1.1 * distance(other, exact)


class Ops(TorchDispatchMode):
    """The names of the ops that ran, with the shape of what they gave."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ran.append((func.overloadpacket.__name__, tuple(out.shape) if isinstance(out, torch.Tensor) else None))
        return out


@pytest.mark.parametrize("hold", [True, False])
def test_a_micro_batch_after_the_first_adds_within_its_products(hold):
    layers = layers_of(bias=False)
    (x, upstream), (_, again) = micro_batches(2, torch.float32, rows=(40, 40))
    torch.autograd.backward(multiply(x, *layers), upstream)
    before = [layer.weight.grad for layer in layers]
    with accumulation(hold), Ops() as ops:
        torch.autograd.backward(multiply(x, *layers), again)
    assert all(layer.weight.grad is gradient for layer, gradient in zip(layers, before, strict=True))
    views, shapes = ("t", "detach", "view"), [(width, 32) for width in WIDTHS]
    assert [name for name, shape in ops.ran if shape in shapes and name not in views] == ["addmm"] * 3
    # What is added is what x.grad had before.
    assert [name for name, shape in ops.ran if shape == (40, 32) and name not in views] == ["mm", "addmm", "addmm", "add_"]


def test_a_gradient_asked_for_leaves_those_that_are_there():
    layers = layers_of()
    (x, upstream), (y, again) = micro_batches(2, torch.float32)
    torch.autograd.backward(multiply(x, *layers), upstream)
    before = copy.deepcopy([p.grad for p in layers.parameters()])
    asked = torch.autograd.grad(multiply(y, *layers), list(layers.parameters()), again)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(layers.parameters(), before, strict=True))
    torch.autograd.backward(multiply(y, *layers), again)
    for parameter, one, other in zip(layers.parameters(), before, asked, strict=True):
        assert torch.equal(parameter.grad, one + other)


def test_weights_are_cast_once_a_step_and_anew_after_it():
    layers = layers_of()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with accumulation(), Ops() as ops:
            for x, upstream in micro_batches(3, torch.bfloat16):
                outs = multiply(x, *layers)
                for layer, out in zip(layers, outs, strict=True):
                    assert torch.equal(out, plainly(x, layer.weight.detach().clone(), layer.bias))
                torch.autograd.backward(outs, upstream)
        # One more by each comparison.
        assert sum(name == "_to_copy" and shape == (48, 32) for name, shape in ops.ran) == 1 + 3
        optimizer.step()


@pytest.mark.parametrize(("hold", "casts"), [(True, 1), (False, 3)])
def test_casts_are_held_where_asked_for(hold, casts):
    layers = layers_of()
    with accumulation(hold), Ops() as ops:
        for x, upstream in micro_batches(3, torch.bfloat16):
            torch.autograd.backward(multiply(x, *layers), upstream)
    assert sum(name == "_to_copy" and shape == (48, 32) for name, shape in ops.ran) == casts


def test_outside_a_step_nothing_is_held():
    layers = layers_of()
    x, _ = next(micro_batches(1, torch.bfloat16))
    for _ in range(2):
        assert torch.equal(multiply(x, *layers)[0], plainly(x, layers[0].weight, layers[0].bias))
        with torch.no_grad():
            assert torch.equal(multiply(x, *layers)[0], plainly(x, layers[0].weight, layers[0].bias))
            # Without a new version of the tensor, as fused optimizers write.
            layers[0].weight.data.add_(1.0)


def test_a_result_that_nobody_uses_gives_no_gradient():
    layers = layers_of()
    x, upstream = next(micro_batches(1, torch.float32))
    first, second, _ = multiply(x, *layers)
    torch.autograd.backward([first, second], upstream[:2])
    assert layers[2].weight.grad is None
    torch.testing.assert_close(x.grad, upstream[0] @ layers[0].weight + upstream[1] @ layers[1].weight)


def test_rows_of_more_than_one_dimension():
    layers = layers_of()
    x, upstream = next(micro_batches(1, torch.float32))
    torch.autograd.backward(multiply(x, *layers), upstream)
    expected, x.grad = [x.grad, *(p.grad for p in layers.parameters())], None
    layers.zero_grad()
    torch.autograd.backward(multiply(x.unflatten(0, (5, 8)), *layers), [d.unflatten(0, (5, 8)) for d in upstream])
    assert all(torch.equal(one, other) for one, other in zip(expected, [x.grad, *(p.grad for p in layers.parameters())], strict=True))
