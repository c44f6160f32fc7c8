"""Every room's implementations against the truth: the op written out once more, row by row, in fp64.

Judged by distance: ||got - truth|| / ||truth||, of the output and of every gradient, at most the slack of the working
dtype. `test_slack_is_tight_enough_to_fail` shows that the slack tells each op from its nearest wrong one.
Shape letters: T rows, D width, F inner width, H query heads, G key heads, K head width, V vocabulary, M supervised rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllava_kernels import rooms
from fastllava_kernels.room import REFERENCE

FP64 = torch.float64
# Inputs are rounded to the dtype before truth sees them, so this is what the computation itself may lose.
SLACK = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}

Args = tuple[Any, ...]


# Truth: a function of each room's arguments, written without the op it judges.


def true_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.stack([row / (sum(v * v for v in row) / len(row) + eps).sqrt() * weight for row in x]) if len(x) else x * weight


def true_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred * (centred.square().sum(-1, keepdim=True) / x.shape[-1] + eps) ** -0.5 * weight + bias


def true_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def true_quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def true_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates i and i + K/2 are one complex number, turned by the row's angle i."""
    half = cos.shape[1] // 2
    turn = torch.complex(cos[:, None, :half], sin[:, None, :half])
    turned = [torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k)]
    first, second = (torch.cat((z.real, z.imag), dim=-1) for z in turned)
    return first, second


def true_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """One row and one head after another."""
    group = q.shape[1] // k.shape[1]
    bounds = cu_seqlens.tolist()
    out = []
    for start, end in pairwise(bounds):
        for row in range(start, end):
            seen = slice(start, row + 1 if causal else end)
            for head in range(q.shape[1]):
                scores = (k[seen, head // group] * q[row, head]).sum(-1) / math.sqrt(q.shape[2])
                share = torch.exp(scores - scores.max().detach())
                out.append((share / share.sum()) @ v[seen, head // group])
    return torch.stack(out).view(q.shape) if out else q * 1


def true_projector_splice(
    features: Tensor, layers: Sequence[tuple[Tensor, Tensor]], embedding: Tensor, token_ids: Tensor, text_rows: Tensor, patch_rows: Tensor
) -> Tensor:
    """One row after another; the GELU is the one with erf."""
    rows = {row: embedding[token_ids[row]] for row in text_rows.tolist()}
    for patch, row in enumerate(patch_rows.tolist()):
        hidden = features[patch]
        for index, (weight, bias) in enumerate(layers):
            if index:
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            hidden = weight @ hidden + bias
        rows[row] = hidden
    return torch.stack([rows[row] for row in range(len(token_ids))]) if len(token_ids) else embedding[:0]


def true_masked_linear_cross_entropy(hidden: Tensor, weight: Tensor, supervised_rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    loss = hidden.sum() * 0
    for row, target, share in zip(supervised_rows.tolist(), targets.tolist(), weights.tolist(), strict=True):
        logits = weight @ hidden[row]
        loss = loss + share * (logits.exp().sum().log() - logits[target])
    return loss


TRUTH: dict[str, Callable[..., Any]] = {
    "attention": true_attention,
    "layer_norm": true_layer_norm,
    "masked_linear_cross_entropy": true_masked_linear_cross_entropy,
    "projector_splice": true_projector_splice,
    "quick_gelu": true_quick_gelu,
    "rms_norm": true_rms_norm,
    "rope": true_rope,
    "swiglu": true_swiglu,
}


# Inputs: arguments in fp64 for each room and shape.


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64) * scale


def attention_inputs(lengths: Sequence[int], heads: int, key_heads: int, causal: bool) -> Args:
    rows = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value = (draw(rows, n, 8, seed=seed) for seed, n in enumerate((heads, key_heads, key_heads)))
    return query, key, value, cu_seqlens, max(lengths, default=0), causal


@dataclass(frozen=True)
class Table:
    """An argument that is computed, not learnt: no implementation owes it a gradient."""

    values: Tensor


def rope_inputs(rows: int, key_heads: int) -> Args:
    angles = torch.outer(torch.arange(rows, dtype=FP64), 100.0 ** (-torch.arange(4, dtype=FP64) / 4))
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    return draw(rows, 4, 8), draw(rows, key_heads, 8, seed=1), Table(cos), Table(sin)


def splice_inputs(rows: int, patch_rows: Sequence[int], depth: int) -> Args:
    """`depth` Linear layers from width 6 to 5; none is the identity, with features as wide as the embedding."""
    widths = [6 if depth else 5] + [5] * depth
    layers = [(draw(out, into, seed=out + i), draw(out, seed=40 + i)) for i, (into, out) in enumerate(pairwise(widths))]
    text = [row for row in range(rows) if row not in patch_rows]
    ids = torch.tensor([(7 * row + 3) % 9 if row in text else 0 for row in range(rows)], dtype=torch.int64)
    where = torch.tensor(list(patch_rows), dtype=torch.int32)
    return draw(len(patch_rows), widths[0], seed=1), layers, draw(9, 5, seed=2), ids, torch.tensor(text, dtype=torch.int32), where


def loss_inputs(rows: int, supervised: Sequence[int]) -> Args:
    count = len(supervised)
    targets = torch.tensor([(5 * row + 1) % 11 for row in supervised], dtype=torch.int64)
    weights = torch.linspace(0.0, 0.7, count) if count else torch.zeros(0)
    return draw(rows, 6), draw(11, 6, seed=1), torch.tensor(list(supervised), dtype=torch.int32), targets, weights


CASES: dict[str, dict[str, Args]] = {
    "attention": {
        "ragged": attention_inputs([1, 5, 3], 4, 4, True),
        "ragged, not causal": attention_inputs([1, 5, 3], 4, 4, False),
        "equal lengths": attention_inputs([4, 4], 4, 4, True),
        "equal lengths, not causal": attention_inputs([4, 4], 4, 4, False),
        "grouped": attention_inputs([2, 6], 4, 2, True),
        "grouped, equal lengths": attention_inputs([3, 3], 4, 1, True),
        "one row": attention_inputs([1], 2, 2, True),
        "no sample": attention_inputs([], 2, 2, True),
    },
    "layer_norm": {
        "usual": (draw(7, 16), draw(16, seed=1), draw(16, seed=2), 1e-5),
        "small values, where eps counts": (draw(7, 16, scale=1e-3), draw(16, seed=1), draw(16, seed=2), 1e-5),
        "two axes before": (draw(2, 3, 16), draw(16, seed=1), draw(16, seed=2), 1e-5),
        "one row": (draw(1, 16), draw(16, seed=1), draw(16, seed=2), 1e-5),
        "no row": (draw(0, 16), draw(16, seed=1), draw(16, seed=2), 1e-5),
    },
    "masked_linear_cross_entropy": {
        "usual": loss_inputs(9, [1, 2, 5, 8]),
        "every row": loss_inputs(4, range(4)),
        "one token": loss_inputs(1, [0]),
        "none supervised": loss_inputs(5, []),
        "no row": loss_inputs(0, []),
    },
    "projector_splice": {
        "mlp2x": splice_inputs(9, [2, 3, 4, 5], 2),
        "mlp3x": splice_inputs(9, [2, 3, 4, 5], 3),
        "linear": splice_inputs(9, [0, 1, 7, 8], 1),
        "identity": splice_inputs(6, [1, 2], 0),
        "no image": splice_inputs(4, [], 2),
        "image only": splice_inputs(3, [0, 1, 2], 2),
        "patches cut away": splice_inputs(5, [3, 4, 5, 5, 5], 2),
        "one token": splice_inputs(1, [], 2),
    },
    "quick_gelu": {"usual": (draw(3, 5, scale=3.0),), "no row": (draw(0, 5),)},
    "rms_norm": {
        "usual": (draw(7, 16), draw(16, seed=1), 1e-6),
        "small values, where eps counts": (draw(7, 16, scale=1e-3), draw(16, seed=1), 1e-6),
        "one row": (draw(1, 16), draw(16, seed=1), 1e-6),
        "no row": (draw(0, 16), draw(16, seed=1), 1e-6),
    },
    "rope": {"usual": rope_inputs(6, 4), "grouped": rope_inputs(6, 2), "one row": rope_inputs(1, 4), "no row": rope_inputs(0, 4)},
    "swiglu": {
        "usual": (draw(5, 8, scale=3.0), draw(5, 8, seed=1)),
        "one row": (draw(1, 8), draw(1, 8, seed=1)),
        "no row": (draw(0, 8), draw(0, 8, seed=1)),
    },
}


# Judging.


def rounded(value: Any, dtype: torch.dtype, then: torch.dtype) -> Any:
    """Floating tensors rounded to `dtype` and kept in `then`, as leaves that take a gradient; the rest as it is.

    fp32 tensors are fp32 by contract (the weights of a loss) and stay so; tables (rope's cos and sin) take no gradient.
    """
    if isinstance(value, Table):
        return value.values.to(dtype).to(then)
    if isinstance(value, Tensor) and value.dtype == FP64:
        return value.to(dtype).to(then).requires_grad_()
    if isinstance(value, list | tuple):
        return type(value)(rounded(item, dtype, then) for item in value)
    return value


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value] if isinstance(value, Tensor) and value.requires_grad else []


def outputs_and_gradients(function: Callable[..., Any], args: Args) -> list[Tensor]:
    """The outputs, then the gradient of every leaf, for a fixed cotangent; a leaf out of the graph has the gradient None."""
    result = function(*args)
    outs = list(result) if isinstance(result, tuple) else [result]
    cotangents = [draw(*out.shape, seed=99 + i).to(out.dtype) for i, out in enumerate(outs)]
    grads = torch.autograd.grad(outs, leaves(args), cotangents, allow_unused=True)
    return [*outs, *grads]


def distances(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative distance of each; where truth is nothing or zero, the absolute one."""
    found = []
    for one, true in zip(got, truth, strict=True):
        assert one is not None, "a leaf fell out of the graph"
        true = torch.zeros_like(one, dtype=FP64) if true is None else true
        assert one.shape == true.shape
        scale = true.norm().item()
        found.append((one.double() - true).norm().item() / (scale or 1.0))
    return found


def every_case() -> list[Any]:
    return [
        pytest.param(room, name, case, dtype, id=f"{room.name}-{name}-{case}-{str(dtype).removeprefix('torch.')}")
        for room in rooms().values()
        for name, implementation in room.implementations.items()
        for case in CASES.get(room.name, {})
        for dtype in SLACK
        if implementation.unsupported(torch.device("cpu"), dtype) is None
    ]


@pytest.mark.parametrize(("room", "name", "case", "dtype"), every_case())
def test_close_to_truth(room: Any, name: str, case: str, dtype: torch.dtype) -> None:
    args = CASES[room.name][case]
    truth = outputs_and_gradients(TRUTH[room.name], rounded(args, dtype, FP64))
    got = outputs_and_gradients(room.implementations[name].function, rounded(args, dtype, dtype))
    wanted = torch.float32 if room.name == "masked_linear_cross_entropy" else dtype
    assert got[0].dtype == wanted
    far = distances(got, truth)
    assert all(distance <= SLACK[dtype] for distance in far), far


@pytest.mark.parametrize("name", rooms())
def test_truth_knows_every_room(name: str) -> None:
    assert name in TRUTH, f"a new room: write true_{name} and its CASES here"
    assert len(CASES[name]) >= 2


@pytest.mark.parametrize("name", TRUTH)
def test_gradients_of_truth_are_those_of_finite_differences(name: str) -> None:
    args = rounded(next(iter(CASES[name].values())), FP64, FP64)
    inputs = leaves(args)

    def function(*values: Tensor) -> Any:
        given = iter(values)
        return TRUTH[name](*refilled(args, given))

    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, fast_mode=True)


def refilled(value: Any, given: Any) -> Any:
    """`value` with its leaves taken from `given`, in order."""
    if isinstance(value, list | tuple):
        return type(value)(refilled(item, given) for item in value)
    return next(given) if isinstance(value, Tensor) and value.requires_grad else value


# What the slack must tell apart: each op's nearest wrong one.


def wrong_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * weight


def wrong_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0).sqrt() + eps) * weight + bias


def wrong_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring coordinates in place of halves."""
    swapped = [torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) for x in (q, k)]
    return q * cos[:, None] + swapped[0] * sin[:, None], k * cos[:, None] + swapped[1] * sin[:, None]


def wrong_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """Samples see each other."""
    whole = torch.tensor([0, len(q)], dtype=torch.int32)
    return rooms()["attention"].implementations[REFERENCE].function(q, k, v, whole, len(q), causal)


def wrong_splice(features: Tensor, layers: Any, embedding: Tensor, token_ids: Tensor, text_rows: Tensor, patch_rows: Tensor) -> Tensor:
    """The GELU with tanh."""
    hidden = features @ layers[0][0].T + layers[0][1]
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh") @ layers[1][0].T + layers[1][1]
    return embedding[token_ids].index_copy(0, patch_rows.long(), hidden)


def wrong_loss(hidden: Tensor, weight: Tensor, supervised_rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weights' sum divided out once more."""
    reference = rooms()["masked_linear_cross_entropy"].implementations[REFERENCE].function
    return reference(hidden, weight, supervised_rows, targets, weights) / weights.sum()


WRONG = {
    "attention": (wrong_attention, "ragged"),
    "layer_norm": (wrong_layer_norm, "small values, where eps counts"),
    "masked_linear_cross_entropy": (wrong_loss, "every row"),
    "projector_splice": (wrong_splice, "mlp2x"),
    "quick_gelu": (torch.nn.functional.gelu, "usual"),
    "rms_norm": (wrong_rms_norm, "small values, where eps counts"),
    "rope": (wrong_rope, "usual"),
    "swiglu": (lambda gate, up: torch.nn.functional.gelu(gate) * up, "usual"),
}


@pytest.mark.parametrize("name", WRONG)
def test_slack_is_tight_enough_to_fail(name: str) -> None:
    wrong, case = WRONG[name]
    args = CASES[name][case]
    truth = outputs_and_gradients(TRUTH[name], rounded(args, torch.float32, FP64))[0]
    got = outputs_and_gradients(wrong, rounded(args, torch.float32, torch.float32))[0]
    assert distances([got], [truth])[0] > 10 * SLACK[torch.float32]


# Contracts that no distance shows.


@pytest.mark.parametrize("case", ["no image", "one token"])
def test_projector_without_images_has_zero_gradients_not_none(case: str) -> None:
    args = rounded(CASES["projector_splice"][case], torch.float32, torch.float32)
    rooms()["projector_splice"].implementations[REFERENCE].function(*args).sum().backward()
    for weight, bias in args[1]:
        assert torch.equal(weight.grad, torch.zeros_like(weight))
        assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_loss_without_supervised_rows_is_zero_with_zero_gradients() -> None:
    args = rounded(CASES["masked_linear_cross_entropy"]["none supervised"], torch.float32, torch.float32)
    loss = rooms()["masked_linear_cross_entropy"].implementations[REFERENCE].function(*args)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(args[0].grad, torch.zeros_like(args[0]))
    assert torch.equal(args[1].grad, torch.zeros_like(args[1]))


def test_patch_that_is_cut_gets_no_gradient() -> None:
    args = rounded(CASES["projector_splice"]["patches cut away"], torch.float32, torch.float32)
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
