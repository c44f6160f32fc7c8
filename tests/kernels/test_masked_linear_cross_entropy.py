"""What the distance to truth of small cases does not show of masked_linear_cross_entropy's kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import FP64, distances, outputs_and_gradients, rounded
from launches import recorded
from torch import Tensor
from truths.masked_linear_cross_entropy import CASES, loss_inputs, truth

from fastllava_kernels import rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.masked_linear_cross_entropy import chunked, eager, kernel_loss_rows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CODES = {"triton": kernel_loss_rows, "torch": eager}
ROOM = rooms()["masked_linear_cross_entropy"]
OPS = {name: ROOM.implementations[name].function for name in CODES}
REFERENCE = ROOM.implementations["reference"].function

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_code = pytest.mark.parametrize("code", CODES.values(), ids=CODES)
pytestmark = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="Triton was loaded without its interpreter and there is no GPU")


def on_device(args: Any, dtype: torch.dtype = torch.float32) -> Any:
    return rounded(args, dtype, dtype, DEVICE)


def logits_of(gaps: list[float], vocabulary: int) -> tuple[Tensor, Tensor]:
    """fp32 [N, V]: row i has the target's logit 0 and the others `gaps[i]` above it, less a little that differs; and the targets."""
    targets = torch.arange(len(gaps)) % vocabulary
    logits = torch.tensor(gaps)[:, None] - 0.01 * torch.arange(vocabulary)
    return logits.scatter(1, targets[:, None], 0.0).to(DEVICE), targets.to(DEVICE)


GAPS = [0.0, -1.0, -5.0, -10.0, -13.8, -16.2, -18.0, -30.0, -100.0, 5.0, 30.0, 90.0, 100.0]
"""-16.2 and fewer: p = 1 - 1e-7 and closer to 1, where log(sum) - z_y in fp32 is 0."""


@pytest.mark.parametrize("vocabulary", [2, 101, kernel_loss_rows.LARGEST_ROW + 3])
@every_code
def test_rows_keep_their_digits_however_confident(code: Any, vocabulary: int) -> None:
    logits, targets = logits_of(GAPS, vocabulary)
    true = logits.double().requires_grad_()
    others = (true - true.gather(1, targets[:, None])).scatter(1, targets[:, None], -torch.inf)
    # log(1 + sum exp(z_v - z_y)): in fp64 too the other form would cancel.
    exact = torch.logaddexp(torch.logsumexp(others, 1), torch.zeros(len(GAPS), dtype=FP64, device=DEVICE))
    exact = torch.where(exact < 1e-9, torch.logsumexp(others, 1).exp(), exact)
    exact.sum().backward()
    assert true.grad is not None
    gradient = logits.clone()
    losses, residual = code.loss_rows(gradient, targets, torch.ones(len(GAPS), device=DEVICE), gradient, True)
    # exp(-100) is below fp32's normal numbers: 0 is all that can be asked there.
    normal = exact > torch.finfo(torch.float32).tiny
    assert normal.sum() >= len(GAPS) - 1
    relative = ((losses.double() - exact) / exact).abs()[normal]
    assert relative.max() < 2e-6, relative
    assert losses[~normal].abs().max() < torch.finfo(torch.float32).tiny
    error = ((gradient.double() - true.grad).norm(dim=1) / true.grad.norm(dim=1))[normal]
    assert error.max() < 1e-5, error
    assert torch.equal(residual, torch.zeros_like(residual))


def test_the_usual_form_loses_confident_rows() -> None:
    """Why the kernel takes another one: PyTorch's loss of a row with p = 1 - 1e-8 is 0, its whole error."""
    logits, targets = logits_of([-18.0], 2)
    assert torch.nn.functional.cross_entropy(logits, targets).item() == 0.0


@every_code
def test_residual_is_what_rounding_the_target_s_gradient_took(code: Any) -> None:
    logits, targets = logits_of([0.3, -2.0, -7.0], 101)
    weights = torch.tensor([0.3, 1.0, 0.7], device=DEVICE)
    wide, narrow = logits.clone(), logits.half()
    code.loss_rows(wide, targets, weights, wide, True)
    _, residual = code.loss_rows(logits.clone(), targets, weights, narrow, True)
    kept = narrow.gather(1, targets[:, None]).squeeze(1).float()
    assert torch.equal(kept + residual, wide.gather(1, targets[:, None]).squeeze(1))
    assert residual.abs().min() > 0


@every_code
def test_input_gradient_of_confident_rows_in_half_precision(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual completes the target's term: without it the error is the rounding of 1 - p."""
    op = next(OPS[name] for name, other in CODES.items() if other is code)
    hidden, weight, rows, targets, weights = loss_inputs(7, [0, 2, 3, 6], 40)
    args = (hidden * 3, weight * 2, rows, targets, torch.ones_like(weights))
    true = outputs_and_gradients(truth, rounded(args, torch.float16, FP64))
    complete = distances(outputs_and_gradients(op, on_device(args, torch.float16)), true)
    original = code.scatter_rows
    monkeypatch.setattr(code, "scatter_rows", lambda d, residual, *rest: original(d, torch.zeros_like(residual), *rest))
    without = distances(outputs_and_gradients(op, on_device(args, torch.float16)), true)
    assert complete[1] < 1.01 * without[1]
    assert complete[0] == without[0]


@given(
    rows=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    width=st.sampled_from([1, 5, 16, 33]),
    vocabulary=st.sampled_from([1, 2, 31, 64, 101]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None, derandomize=True)
@every_op
def test_any_shape(op: Callable[..., Tensor], rows: int, share: float, width: int, vocabulary: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    supervised = torch.randperm(rows, generator=draws)[: round(share * rows)].int()
    args = (
        torch.randn(rows, width, generator=draws, dtype=FP64),
        torch.randn(vocabulary, width, generator=draws, dtype=FP64),
        supervised,
        torch.randint(vocabulary, (len(supervised),), generator=draws),
        torch.rand(len(supervised), generator=draws),
    )
    true = outputs_and_gradients(truth, rounded(args, torch.float32, FP64))
    reference = distances(outputs_and_gradients(REFERENCE, on_device(args)), true)
    found = distances(outputs_and_gradients(op, on_device(args)), true)
    assert all(ours <= theirs + 1e-6 for ours, theirs in zip(found, reference, strict=True)), (found, reference)


@every_op
def test_chunks_change_nothing(op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    args = loss_inputs(13, range(0, 13, 2), 50)
    whole = outputs_and_gradients(op, on_device(args))
    for most in (1, 2, 3, 5):
        monkeypatch.setattr(chunked, "CHUNK", most)
        assert len(chunked.chunks(7, most)) == -(-7 // most)
        cut = outputs_and_gradients(op, on_device(args))
        assert max(distances(cut, [tensor.double() for tensor in whole])) < 1e-6


@pytest.mark.parametrize(("rows", "most"), [(0, 4), (1, 4), (819, 1024), (1024, 1024), (1025, 1024), (3000, 1024), (16384, 1024), (7, 1)])
def test_chunks_cover_every_row_once(rows: int, most: int) -> None:
    pieces = chunked.chunks(rows, most)
    assert [row for start, end in pieces for row in range(start, end)] == list(range(rows))
    assert all(end - start <= most for start, end in pieces)
    # 1,025 rows are two chunks of about 512, not one of 1,024 and one of a row.
    assert len(pieces) < 2 or pieces[-1][1] - pieces[-1][0] > most // 4 or most < 128


@every_op
def test_permuted_samples_give_permuted_gradients(op: Callable[..., Tensor]) -> None:
    hidden, weight, rows, targets, weights = on_device(CASES["usual"])
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    plain = outputs_and_gradients(op, (hidden, weight, rows, targets, weights))
    mixed = outputs_and_gradients(op, (hidden, weight, rows[order], targets[order], weights[order]))
    moved = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    where = torch.empty_like(moved)
    where[moved] = torch.arange(len(moved), device=DEVICE)
    other = outputs_and_gradients(op, (hidden.detach()[moved].requires_grad_(), weight, where[rows.long()].int(), targets, weights))
    other[1] = other[1][where]
    for found in (mixed, other):
        assert max(distances(found, [tensor.double() for tensor in plain])) < 1e-6


@every_op
def test_same_bits_twice(op: Callable[..., Tensor]) -> None:
    first, second = (outputs_and_gradients(op, on_device(loss_inputs(9, [1, 2, 5, 8], 101))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_op
def test_nothing_is_read_that_was_not_written(op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    args = on_device(CASES["V no multiple of a block"])
    plain = outputs_and_gradients(op, args)
    # Memory that is handed out holds NaN.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = outputs_and_gradients(op, args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@every_code
def test_memory_around_the_rows_stays_as_it_was(code: Any, dtype: torch.dtype) -> None:
    logits, targets = logits_of([0.5, -3.0], 101)
    guarded = torch.full((4, 128), float("nan"), device=DEVICE)
    guarded[1:3, :101] = logits
    gradients = guarded if dtype == torch.float32 else torch.full((4, 128), float("nan"), dtype=dtype, device=DEVICE)
    losses, _ = code.loss_rows(guarded[1:3, :101], targets, torch.ones(2, device=DEVICE), gradients[1:3, :101], True)
    assert torch.isfinite(losses).all()
    inside = torch.zeros_like(guarded, dtype=torch.bool)
    inside[1:3, :101] = True
    assert torch.isfinite(gradients[inside]).all()
    assert guarded[~inside].isnan().all()
    assert gradients[~inside].isnan().all()
    d_hidden = torch.full((5, 24), float("nan"), dtype=dtype, device=DEVICE)
    rows = torch.tensor([1, 3], dtype=torch.int32, device=DEVICE)
    d_rows, weight = torch.ones(2, 17, device=DEVICE), torch.ones(101, 17, device=DEVICE)
    code.scatter_rows(d_rows, torch.ones(2, device=DEVICE), torch.tensor(2.0, device=DEVICE), weight, rows, targets, d_hidden[:, :17])
    assert torch.equal(d_hidden[[1, 3], :17].float(), torch.full((2, 17), 4.0, device=DEVICE))
    assert d_hidden[[0, 2, 4]].isnan().all()
    assert d_hidden[:, 17:].isnan().all()


@every_op
def test_inputs_need_not_be_contiguous(op: Callable[..., Tensor]) -> None:
    hidden, weight, rows, targets, weights = on_device(loss_inputs(9, [1, 2, 5, 8], 30))
    plain = outputs_and_gradients(op, (hidden, weight, rows, targets, weights))

    def every_second(x: Tensor) -> Tensor:
        return torch.stack((x, torch.zeros_like(x)), dim=-1)[..., 0]

    strided = (
        hidden.detach().t().contiguous().t().requires_grad_(),
        weight.detach().t().contiguous().t().requires_grad_(),
        every_second(rows),
        every_second(targets),
        every_second(weights),
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert max(distances(outputs_and_gradients(op, strided), [tensor.double() for tensor in plain])) < 1e-6


@every_code
def test_the_weight_of_the_residual_need_not_be_contiguous(code: Any) -> None:
    weight = torch.arange(15.0, device=DEVICE).view(3, 5)
    rows, targets = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE), torch.tensor([2, 1], device=DEVICE)
    one = torch.ones((), device=DEVICE)
    results = []
    for given_weight in (weight, weight.t().contiguous().t()):
        results.append(torch.zeros(2, 5, device=DEVICE))
        code.scatter_rows(torch.zeros(2, 5, device=DEVICE), one.expand(2).contiguous(), one, given_weight, rows, targets, results[-1])
    assert torch.equal(*results)
    assert torch.equal(results[0], weight[[1, 2]])


@every_op
def test_a_kept_graph_gives_its_gradients_again(op: Callable[..., Tensor]) -> None:
    """Nothing that was saved is written to, so a scale of 3 in the first backward is not in the second."""
    hidden, weight, *rest = on_device(CASES["usual"])
    loss = op(hidden, weight, *rest)
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for thrice, once in zip(first, second, strict=True):
        torch.testing.assert_close(thrice, 3 * once, rtol=1e-6, atol=1e-7)


@every_op
def test_used_twice_in_one_graph(op: Callable[..., Tensor]) -> None:
    hidden, weight, rows, targets, weights = on_device(CASES["usual"])
    alone = [torch.autograd.grad(op(hidden, weight, rows, t, weights), (hidden, weight)) for t in (targets, targets.flip(0))]
    both = op(hidden, weight, rows, targets, weights) + op(hidden, weight, rows, targets.flip(0), weights)
    for total, parts in zip(torch.autograd.grad(both, (hidden, weight)), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(total, parts[0] + parts[1], rtol=1e-6, atol=1e-7)


@every_op
def test_gradients_add_to_those_that_are_there(op: Callable[..., Tensor]) -> None:
    hidden, weight, *rest = on_device(CASES["usual"])
    once = torch.autograd.grad(op(hidden, weight, *rest), (hidden, weight))
    leaves = (hidden, weight)
    # The same graph thrice: had .grad become the very tensor that the graph keeps, the sums would double it.
    loss = op(hidden, weight, *rest)
    for _ in range(3):
        loss.backward(retain_graph=True)
    before = [leaf.grad for leaf in leaves]
    op(hidden, weight, *rest).backward()
    for leaf, gradient, there in zip(leaves, once, before, strict=True):
        assert leaf.grad is there, "the sum is kept in place"
        torch.testing.assert_close(leaf.grad, 4 * gradient, rtol=1e-6, atol=1e-7)


@every_op
def test_master_weights_get_fp32_gradients_from_half_activations(op: Callable[..., Tensor]) -> None:
    hidden, weight, rows, targets, weights = CASES["usual"]
    halves = hidden.half().to(DEVICE)
    master = weight.half().float().to(DEVICE).requires_grad_()
    rest = tuple(x.to(DEVICE) for x in (rows, targets, weights))
    (gradient,) = torch.autograd.grad(op(halves, master, *rest), master)
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.half().float()), "rounded on the way"


@every_op
def test_only_wanted_gradients_are_formed(op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    original = chunked.forward
    monkeypatch.setattr(chunked, "forward", lambda *args: results.append(original(*args)) or results[-1])
    hidden, weight, *rest = on_device(CASES["usual"])
    op(hidden, weight.detach(), *rest).backward()
    op(hidden.detach(), weight, *rest).backward()
    with torch.no_grad():
        op(hidden, weight, *rest)
    assert [(len(r.d_rows), len(r.d_logits), len(r.d_weight)) for r in results] == [(4, 0, 0), (0, 4, 0), (0, 0, 0)]


@every_op
def test_the_weight_s_gradient_is_the_same_in_forward_and_in_backward(op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """With many rows it is summed chunk by chunk in forward; with few it waits for backward and is written once."""
    for dtype in (torch.float32, torch.float16):
        args = on_device(loss_inputs(13, range(0, 13, 2), 50), dtype)
        waiting = outputs_and_gradients(op, args)
        with monkeypatch.context() as patch:
            patch.setattr(chunked, "keeps_logit_gradients", lambda *_: False)
            patch.setattr(chunked, "CHUNK", 3)
            at_once = outputs_and_gradients(op, args)
        assert max(distances(at_once, [tensor.double() for tensor in waiting])) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert chunked.keeps_logit_gradients(819, 4096, torch.bfloat16)
    assert not chunked.keeps_logit_gradients(16384, 4096, torch.bfloat16)


@pytest.mark.parametrize("name_of_op", OPS)
def test_opcheck(name_of_op: str) -> None:
    custom = getattr(torch.ops.fastllava, f"masked_linear_cross_entropy_{name_of_op}")
    for name in ("usual", "every row", "none supervised"):
        torch.library.opcheck(custom, (*on_device(CASES[name]), True, True))


@every_op
def test_in_a_compiled_graph_without_recompiling(op: Callable[..., Tensor]) -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return op(hidden * 2, weight, rows, targets, weights) * 3

    compiled = torch.compile(step, backend=graphs, fullgraph=True, dynamic=True)
    for count in (4, 2, 3, 6):
        args = loss_inputs(9, range(count), 30)
        plain = outputs_and_gradients(step, on_device(args))
        found = outputs_and_gradients(compiled, on_device(args))
        assert max(distances(found, [tensor.double() for tensor in plain])) < 1e-6
    assert graphs.frame_count == 1


def test_rows_beyond_2_to_the_31_elements(vast: Tensor) -> None:
    """Row 4 at 2**30 elements a row: its offset, 2**32, is 0 in 32 bits."""
    d_hidden = vast.as_strided((5, 16), (2**30, 1))
    d_hidden[[0, 4]] = 0.0
    rows, targets = torch.tensor([4], dtype=torch.int32), torch.tensor([0])
    kernel_loss_rows.scatter_rows(torch.ones(1, 16), torch.zeros(1), torch.tensor(1.0), torch.ones(1, 16), rows, targets, d_hidden)
    assert torch.equal(d_hidden[4], torch.ones(16, dtype=torch.float16))
    assert torch.equal(d_hidden[0], torch.zeros(16, dtype=torch.float16))


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = recorded(monkeypatch, kernel_loss_rows)
    outputs_and_gradients(OPS["triton"], on_device(CASES["usual"]))
    assert launched == [(name, torch.empty(0, device=DEVICE).device) for name in ("_loss_row", "_scatter_row", "_scale")]
