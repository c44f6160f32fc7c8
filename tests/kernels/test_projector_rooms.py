"""What the distance to truth of single cases does not show of the ops of projector_splice, projector_mlp and splice."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import FP64, Args, distances, draw, leaves, outputs_and_gradients, rounded
from torch import Tensor
from truths import truth_of

from fastllava_kernels import rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.contract import SLACK

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROOMS = ("projector_splice", "projector_mlp", "splice")
IMPLEMENTATIONS = ("triton", "torch")

every_room = pytest.mark.parametrize("room", ROOMS)
every_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)
pytestmark = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="Triton was loaded without its interpreter and there is no GPU")


def function(room: str, name: str) -> Callable[..., Tensor]:
    return rooms()[room].implementations[name].function


def on_device(args: Any, dtype: torch.dtype = torch.float32) -> Any:
    return rounded(args, dtype, dtype, DEVICE)


def usual(room: str) -> Args:
    """Small, with text between two images, a token that comes again, and layers of unequal widths."""
    if room == "projector_mlp":
        return truth_of(room).inputs(7, 6, 9, 5)
    if room == "splice":
        return truth_of(room).inputs(20, [*range(2, 6), *range(9, 13), 20], 5, 4)
    return spliced([2, 4], [3, 2], cut=1)


def spliced(texts: list[int], images: list[int], cut: int = 0, tower: int = 6, width: int = 5, tokens: int = 4, layers: int = 2) -> Args:
    """One sample after another: some text, an image, a last token. The last `cut` patches have no row."""
    text_rows: list[int] = []
    patch_rows: list[int] = []
    row = 0
    for text, image in zip(texts, images, strict=True):
        text_rows += [*range(row, row + text), row + text + image]
        patch_rows += range(row + text, row + text + image)
        row += text + image + 1
    patch_rows += [row] * cut
    widths = [tower if layers else width] + [width] * layers
    weights = [(draw(o, i, seed=o + n, scale=0.5), draw(o, seed=40 + n)) for n, (i, o) in enumerate(pairwise(widths))]
    ids = torch.randint(tokens, (row,), generator=torch.Generator().manual_seed(row))
    where = [torch.tensor(rows, dtype=torch.int32) for rows in (text_rows, patch_rows)]
    return draw(len(patch_rows), widths[0], seed=1), weights, draw(tokens, width, seed=2), ids, *where


def assert_close(found: list[Tensor], wanted: list[Tensor], slack: float = 1e-6) -> None:
    apart = distances(found, [tensor.double() for tensor in wanted])
    assert max(apart) < slack, apart


@given(
    texts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    images=st.lists(st.integers(0, 7), min_size=3, max_size=3),
    cut=st.integers(0, 2),
    tower=st.sampled_from([1, 6, 16, 33]),
    width=st.sampled_from([1, 5, 16, 33]),
    layers=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None, derandomize=True)
@every_implementation
def test_any_shape(name: str, texts: list[int], images: list[int], cut: int, tower: int, width: int, layers: int) -> None:
    args = spliced(texts, images[: len(texts)], cut, tower, width, 4, layers)
    true = outputs_and_gradients(truth_of("projector_splice").truth, rounded(args, torch.float32, FP64))
    reference = distances(outputs_and_gradients(function("projector_splice", "reference"), on_device(args)), true)
    found = distances(outputs_and_gradients(function("projector_splice", name), on_device(args)), true)
    assert all(ours <= theirs + SLACK[torch.float32] for ours, theirs in zip(found, reference, strict=True)), (found, reference)


@every_room
@every_implementation
def test_nothing_is_read_that_was_not_written(room: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = on_device(usual(room))
    plain = outputs_and_gradients(function(room, name), args)
    # Memory that is handed out holds NaN.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert args[0].new_empty(3).isnan().all()
        poisoned = outputs_and_gradients(function(room, name), args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@every_room
@every_implementation
def test_same_bits_twice(room: str, name: str) -> None:
    first, second = (outputs_and_gradients(function(room, name), on_device(usual(room), torch.float16)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_implementation
def test_permuted_samples_give_permuted_rows_and_the_same_gradients(name: str) -> None:
    run = function("projector_splice", name)
    features, layers, table, ids, text_rows, patch_rows = on_device(spliced([2, 4], [3, 2]))
    out = run(features, layers, table, ids, text_rows, patch_rows)
    # The second sample first: 7 rows of it, then the 6 of the first.
    rows = torch.tensor([*range(6, 13), *range(6)], device=DEVICE)
    patches = torch.tensor([3, 4, 0, 1, 2], device=DEVICE)
    where = torch.empty_like(rows)
    where[rows] = torch.arange(13, device=DEVICE)
    moved_text = where[text_rows.long()].sort().values.int()
    moved = run(features[patches], layers, table, ids[rows], moved_text, where[patch_rows.long()][patches].int())
    assert_close([moved], [out[rows]])
    cotangent = draw(*out.shape, seed=9).to(out)
    tensors = leaves([features, layers, table])
    assert_close(list(torch.autograd.grad(moved, tensors, cotangent[rows])), list(torch.autograd.grad(out, tensors, cotangent)))


def crooked(value: Any) -> Any:
    """The same values, with neighbours of a row, or of a vector, apart in memory."""
    if isinstance(value, list | tuple):
        return type(value)(crooked(item) for item in value)
    apart = torch.stack((value.detach(), torch.zeros_like(value)), dim=-1)[..., 0]
    return apart.requires_grad_(value.requires_grad)


def with_wide_rows(value: Any) -> Any:
    """The same values, with the rows of matrices farther apart than they are wide."""
    if isinstance(value, list | tuple):
        return type(value)(with_wide_rows(item) for item in value)
    if value.dim() < 2:
        return value
    return torch.cat((value.detach(), torch.full_like(value, torch.nan)), dim=1)[:, : value.shape[1]].requires_grad_(value.requires_grad)


@pytest.mark.parametrize("change", [crooked, with_wide_rows])
@every_room
@every_implementation
def test_inputs_need_not_be_contiguous(room: str, name: str, change: Callable[[Any], Any]) -> None:
    args = on_device(usual(room))
    strided = change(args)
    assert not any(tensor.is_contiguous() for tensor in leaves(strided) if tensor.dim() == 2)
    assert_close(outputs_and_gradients(function(room, name), strided), outputs_and_gradients(function(room, name), args))


@every_room
@every_implementation
def test_upstream_gradients_need_not_be_contiguous(room: str, name: str) -> None:
    args = on_device(usual(room))
    out = function(room, name)(*args)
    row = draw(out.shape[1], seed=7).to(out)
    for cotangent in (
        row.expand_as(out),
        draw(out.shape[1], out.shape[0], seed=7).to(out).t(),
        torch.ones((), device=DEVICE).expand_as(out),
    ):
        assert not cotangent.is_contiguous()
        strided, plain = (torch.autograd.grad(out, leaves(args), c, retain_graph=True) for c in (cotangent, cotangent.contiguous()))
        assert_close(list(strided), list(plain))


@every_room
@every_implementation
def test_a_kept_graph_gives_its_gradients_again(room: str, name: str) -> None:
    """Nothing that was saved, or came from upstream, is written to."""
    args = on_device(usual(room))
    out = function(room, name)(*args)
    cotangent = draw(*out.shape, seed=9).to(out)
    first = torch.autograd.grad(out, leaves(args), 3 * cotangent, retain_graph=True)
    second = torch.autograd.grad(out, leaves(args), cotangent)
    assert_close([gradient / 3 for gradient in first], list(second))


@every_room
@every_implementation
def test_used_twice_in_one_graph(room: str, name: str) -> None:
    args = on_device(usual(room))
    run, tensors = function(room, name), leaves(args)
    once = torch.autograd.grad(run(*args).square().sum(), tensors)
    both = torch.autograd.grad((run(*args) * run(*args)).sum(), tensors)
    assert_close(list(both), list(once))


@every_room
@every_implementation
def test_gradients_add_to_those_that_are_there(room: str, name: str) -> None:
    args = on_device(usual(room))
    run, tensors = function(room, name), leaves(args)
    out = run(*args)
    once = torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
    loss = out.square().sum()
    for _ in range(3):
        loss.backward(retain_graph=True)
    before = [tensor.grad for tensor in tensors]
    run(*args).square().sum().backward()
    assert all(tensor.grad is there for tensor, there in zip(tensors, before, strict=True)), "the sum is kept in place"
    assert_close([tensor.grad / 4 for tensor in tensors], list(once))


@every_implementation
def test_masters_get_fp32_gradients_from_half_activations(name: str) -> None:
    """Their distance to truth is that of fp32 sums: rounded to half precision they would be ten times as far."""
    args = spliced([20, 30], [30, 20], tower=16, width=16, tokens=2, layers=1)
    true = outputs_and_gradients(truth_of("projector_splice").truth, rounded(args, torch.float16, FP64))
    features, layers, table, *rest = on_device(args, torch.float16)
    # Numbers that half precision holds too, and an upstream gradient that it holds, so that only sums are left to be wrong.
    masters = [*((w.detach().float().requires_grad_(), b.detach().float().requires_grad_()) for w, b in layers)]
    master_table = table.detach().float().requires_grad_()
    out = function("projector_splice", name)(features, masters, master_table, *rest)
    assert out.dtype == torch.float16
    cotangent = draw(*out.shape, seed=99).half().to(DEVICE)
    found = list(torch.autograd.grad(out, leaves([masters, master_table]), cotangent))
    assert [gradient.dtype for gradient in found] == [torch.float32] * 3
    exact_args = rounded(args, torch.float16, FP64)
    exact_out = truth_of("projector_splice").truth(*exact_args)
    assert_close([out], true[:1], 1e-3)
    exact = list(torch.autograd.grad(exact_out, leaves(exact_args)[1:], cotangent.double().cpu()))
    assert max(distances(found, exact)) < 2e-6
    assert min(distances([gradient.half() for gradient in found], exact)) > 2e-5


@every_implementation
def test_only_wanted_gradients_are_formed(name: str) -> None:
    """The rest are empty: the tower's when it is frozen, the embedding's in stage pretrain."""
    features, layers, table, *rest = on_device(usual("projector_splice"))
    forward = getattr(torch.ops.fastllava, f"projector_splice_{name}")
    backward = getattr(torch.ops.fastllava, f"projector_splice_{name}_backward")
    weights, biases = ([layer[i].detach() for layer in layers] for i in range(2))
    hidden, *pres = forward(features.detach(), weights, biases, table.detach(), *rest, True)
    assert len(pres) == 1
    assert len(forward(features.detach(), weights, biases, table.detach(), *rest, False)) == 1
    for wanted in ([False] * 6, [True] + [False] * 5, [False, True] + [False] * 4, [False, False, True, False, False, True]):
        found = backward(torch.ones_like(hidden), features.detach(), weights, biases, pres, table.detach(), *rest, wanted)
        assert [bool(gradient.numel()) for gradient in found] == wanted
    everything = backward(torch.ones_like(hidden), features.detach(), weights, biases, pres, table.detach(), *rest, [True] * 6)
    assert torch.equal(everything[2], found[2])


@every_implementation
def test_what_is_kept_for_backward(name: str) -> None:
    """What goes into the GELU, and nothing beside the arguments; nothing at all without gradients or with a frozen projector."""
    features, layers, table, *rest = on_device(usual("projector_splice"))
    frozen = [tuple(tensor.detach() for tensor in layer) for layer in layers]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function("projector_splice", name)(features, layers, table, *rest)
    given = {tensor.data_ptr() for tensor in (features, table, *rest, *leaves(layers))}
    assert [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in given] == [(6, 5)]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function("projector_splice", name)(features.detach(), frozen, table, *rest)
    assert all(tensor.shape != (6, 5) or tensor.data_ptr() in given for tensor in kept)


@every_implementation
@pytest.mark.parametrize("case", ["no image", "one token", "patches cut away"])
def test_promises_of_the_reference(name: str, case: str) -> None:
    """Without images zero gradients, not none; a patch that is cut gets none and changes nothing."""
    args = on_device(truth_of("projector_splice").CASES[case])
    function("projector_splice", name)(*args).sum().backward()
    if case == "patches cut away":
        assert torch.equal(args[0].grad[2:], torch.zeros_like(args[0].grad[2:]))
        assert args[0].grad[:2].abs().min() > 0
        return
    for tensor in leaves(args[1]):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_triton_takes_bf16_of_a_cpu_in_plain_pytorch() -> None:
    """The interpreter's bf16 is wrong."""
    args = rounded(usual("projector_splice"), torch.bfloat16, torch.bfloat16)
    found, wanted = (outputs_and_gradients(function("projector_splice", name), args) for name in IMPLEMENTATIONS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def op_arguments(room: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of the op, and those of the op of its backward."""
    args = on_device(usual(room))
    if room == "splice":
        _, table, ids, text_rows, patch_rows = args
        return args, (torch.ones(len(ids), 5, device=DEVICE), table.detach(), ids, text_rows, patch_rows, [True, True])
    features, layers, *rest = args
    weights, biases = ([layer[i] for layer in layers] for i in range(2))
    forward = (features, weights, biases, *rest, True)
    rows, width = (len(rest[1]), rest[0].shape[1]) if rest else (len(features), weights[-1].shape[0])
    pres = [torch.ones(len(features), weight.shape[0], device=DEVICE) for weight in weights[:-1]]
    fixed = [[tensor.detach() for tensor in tensors] for tensors in (weights, biases)]
    wanted = ([True] if rest else []) + [False, True, True, True, False]
    rest = [tensor.detach() for tensor in rest]
    return forward, (torch.ones(rows, width, device=DEVICE), features.detach(), *fixed, pres, *rest, wanted)


@every_room
@every_implementation
def test_ops_pass_opcheck(room: str, name: str) -> None:
    forward, backward = op_arguments(room)
    torch.library.opcheck(getattr(torch.ops.fastllava, f"{room}_{name}"), forward)
    torch.library.opcheck(getattr(torch.ops.fastllava, f"{room}_{name}_backward"), backward)


@every_room
@every_implementation
def test_in_a_compiled_graph_without_recompiling(room: str, name: str) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    run = function(room, name)

    def step(*args: Any) -> Tensor:
        return run(args[0] * 2, *args[1:]) * 3

    compiled = torch.compile(step, backend=graphs, fullgraph=True, dynamic=True)
    # The first has no two sizes alike, as dynamo would take them for one.
    for texts, images in (([2, 6], [4, 3]), ([5], [4]), ([2, 3, 4], [2, 2, 5])):
        args = on_device(spliced(texts, images))
        if room == "splice":
            args = on_device(draw(sum(images), 5, seed=1)), *args[2:]
        elif room == "projector_mlp":
            args = args[:2]
        assert_close(outputs_and_gradients(compiled, args), outputs_and_gradients(step, args))
    assert graphs.frame_count == 1
