"""Indices from outside: none is followed where it leads to no row, and every implementation answers with the same NaN."""

from typing import Any

import pytest
import torch
from judging import draw
from torch import Tensor

from fastllava_kernels import Room, rooms
from fastllava_kernels._device import plain
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.indices import nan_unless_bounds, or_else
from fastllava_kernels.masked_linear_cross_entropy import eager, kernel_loss_rows
from fastllava_kernels.projector_splice import kernel_place

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOSS = "masked_linear_cross_entropy"


def every_implementation(*names: str) -> Any:
    """Those of these rooms that run here, by themselves or interpreted."""

    def runs(room: Room, name: str) -> bool:
        one = room.implementations[name]
        return one.unsupported(DEVICE, torch.float32) is None or (one.interpretable and INTERPRETED)

    pairs = [(room, name) for room in names for name in rooms()[room].implementations if runs(rooms()[room], name)]
    return pytest.mark.parametrize(("room", "name"), pairs)


def function(room: str, name: str) -> Any:
    return rooms()[room].implementations[name].function


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).float().to(DEVICE).requires_grad_()


def whole(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def framed(x: Tensor) -> Tensor:
    """The same rows with 40 more on either side that no op may read or write."""
    frame = torch.full((len(x) + 80, *x.shape[1:]), 3.0, device=DEVICE)
    frame[40 : 40 + len(x)] = x.detach()
    return frame


VOCABULARY = 37
OUTSIDE = [-100, -1, -12, VOCABULARY, VOCABULARY + 3, 2**31 - 1, 2**32 + 5, -(2**32) + 5, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("label", OUTSIDE)
@every_implementation(LOSS)
def test_a_label_outside_the_vocabulary_is_a_nan_loss(room: str, name: str, label: int) -> None:
    hidden, head = numbers(6, 8), numbers(VOCABULARY, 8, seed=1)
    supervised, weights = whole(1, 2, 5, dtype=torch.int32), torch.full((3,), 0.3, device=DEVICE)
    loss = function(room, name)(hidden, head, supervised, whole(4, label, 36), weights)
    d_hidden, d_head = torch.autograd.grad(loss, (hidden, head))
    assert loss.isnan()
    assert d_hidden[2].isnan().all()
    assert d_head.isnan().all()
    assert d_hidden[[0, 1, 3, 4, 5]].isfinite().all(), "the other rows are what they were"


@pytest.mark.parametrize("row", [-1, -7, 6, 2**31 - 1, 2**32 + 1, 2**63 - 1])
@every_implementation(LOSS)
def test_a_supervised_row_that_is_none_is_a_nan_loss(room: str, name: str, row: int) -> None:
    hidden, head = numbers(6, 8), numbers(VOCABULARY, 8, seed=1)
    loss = function(room, name)(hidden, head, whole(1, row, 5), whole(4, 3, 36), torch.full((3,), 0.3, device=DEVICE))
    _, d_head = torch.autograd.grad(loss, (hidden, head))
    assert loss.isnan()
    assert d_head.isnan().all()
    with torch.no_grad():
        assert function(room, name)(hidden, head, whole(1, row), whole(4, 3), torch.ones(2, device=DEVICE)).isnan()


@pytest.mark.parametrize("vocabulary", [VOCABULARY, kernel_loss_rows.LARGEST_ROW + 1])
@pytest.mark.parametrize("code", [eager, kernel_loss_rows], ids=["torch", "triton"])
def test_the_loss_s_kernels_write_nothing_beside_their_rows(code: Any, vocabulary: int) -> None:
    logits = framed(torch.zeros(3, vocabulary))
    targets = whole(2, vocabulary + 3, -100)
    losses, residual = code.loss_rows(logits[40:43], targets, torch.ones(3, device=DEVICE), logits[40:43], True)
    assert losses.isnan().tolist() == residual.isnan().tolist() == [False, True, True]
    assert (logits[:40] == 3).all()
    assert (logits[43:] == 3).all()
    d_hidden = framed(torch.zeros(4, 8))
    one = torch.ones((), device=DEVICE)
    head = torch.ones(vocabulary, 8, device=DEVICE)
    code.scatter_rows(torch.ones(3, 8, device=DEVICE), losses, one, head, whole(1, 2, 99), targets, d_hidden[40:44])
    assert d_hidden[41].isfinite().all()
    assert d_hidden[42].isnan().all()
    assert (d_hidden[:40] == 3).all()
    assert (d_hidden[44:] == 3).all()


def spliced(room: str, table: Tensor, ids: Tensor, text: Tensor, patches: Tensor) -> tuple[Any, ...]:
    """Arguments of a room for two patches and so many tokens."""
    if room == "splice":
        return numbers(2, 5, seed=2), table, ids, text, patches
    return numbers(2, 4, seed=2), [(numbers(5, 4, seed=3), numbers(5, seed=4))], table, ids, text, patches


@pytest.mark.parametrize("token", [-200, -1, VOCABULARY, 2**31 - 1, 2**32 + 5, 2**63 - 1, -(2**63)])
@every_implementation("splice", "projector_splice")
def test_a_token_outside_the_table_is_a_nan_row(room: str, name: str, token: int) -> None:
    table = numbers(VOCABULARY, 5)
    ids = whole(3, 0, 0, token, 5)
    out = function(room, name)(*spliced(room, table, ids, whole(0, 3, 4), whole(1, 2)))
    assert out.isnan().all(1).tolist() == [False, False, False, True, False]
    assert out[[0, 1, 2, 4]].isfinite().all()
    (gradient,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [3, 5], "its row is no token's"


@pytest.mark.parametrize("wrong", [-1, -5, 6, 2**31 - 1, 2**32 + 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("which", ["text", "patches"])
@every_implementation("splice", "projector_splice")
def test_a_row_that_no_list_names_is_nan_and_none_beside_them_is_written(room: str, name: str, which: str, wrong: int) -> None:
    table = numbers(VOCABULARY, 5)
    text, patches = ([0, wrong, 4], [1, 2]) if which == "text" else ([0, 3, 4], [1, wrong])
    args = spliced(room, table, whole(3, 0, 0, 1, 5), whole(*text), whole(*patches))
    out = function(room, name)(*args)
    lost = 3 if which == "text" else 2
    assert out.isnan().all(1).nonzero().flatten().tolist() == [lost]
    assert out.isnan().any(1).nonzero().flatten().tolist() == [lost]
    first, gradient = torch.autograd.grad(out, (args[0], table), torch.ones_like(out))
    assert first.isfinite().all()
    assert gradient.isfinite().all()
    if which == "patches":
        assert torch.equal(first[1], torch.zeros_like(first[1])), "a patch without a row gets no gradient"


@every_implementation("splice", "projector_splice")
def test_a_row_named_twice_leaves_no_memory_of_others_in_the_result(room: str, name: str) -> None:
    out = function(room, name)(*spliced(room, numbers(VOCABULARY, 5), whole(3, 0, 0, 1, 5), whole(0, 4, 4), whole(1, 2)))
    assert out.isnan().all(1).tolist() == [False, False, False, True, False]


@pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="Triton was loaded without its interpreter and there is no GPU")
def test_kernels_of_rows_read_and_write_their_rows_only() -> None:
    strange = whole(2, -1, 5, 2**32 + 1, -(2**63))
    out, source = framed(torch.zeros(5, 3)), numbers(5, 3).detach()
    kernel_place.ROWS.scatter_rows(source, strange, out[40:45])
    kernel_place.LINEAR.linear_place(source, torch.eye(3, device=DEVICE), torch.zeros(3, device=DEVICE), strange, out[40:45])
    kernel_place.ROWS.embed_rows(source, whole(0, 1, 9, -3, 4), strange, out[40:45])
    assert out[42].isnan().all()
    out[42] = 0.0
    assert torch.equal(out, framed(torch.zeros(5, 3)))
    gathered, total = kernel_place.gather_rows(framed(source)[40:45], strange, True)
    assert torch.equal(gathered, torch.cat((source[2:3], torch.zeros(4, 3, device=DEVICE))))
    assert torch.equal(total, source[2])
    for code in (kernel_place, plain):
        gradient = code.embedding_gradient(
            source, torch.zeros(4, 3, device=DEVICE), whole(3, -1, 1, 4, 2**32 + 1), whole(0, 1, 2, 3, 4, -1, 7)
        )
        assert torch.equal(gradient, torch.stack((torch.zeros_like(source[0]), source[2], torch.zeros_like(source[0]), source[0])))


@pytest.mark.parametrize("given", [[0, 2, 9], [0, 3, 2, 7], [1, 7], [0, 6], [-3, 7], [0, 2**32 + 7]])
@every_implementation("attention")
def test_bounds_of_samples_that_are_none_are_refused_where_they_are_read(room: str, name: str, given: list[int]) -> None:
    if DEVICE.type == "cuda" and name not in ("reference", "sdpa"):
        pytest.skip("does not read them")
    q, k = numbers(7, 4, 8), numbers(7, 2, 8, seed=1)
    with pytest.raises(ValueError, match="cu_seqlens rises from 0 to the number of rows, here 7"):
        function(room, name)(q, k, k, whole(*given), 7, True)


@pytest.mark.parametrize("given", [[0, 2, 9], [0, 3, 2, 7], [1, 7], [0, 6], [-3, 7], [0, 2**32 + 7], [0, 6, 7]])
def test_bounds_that_are_none_are_a_nan_on_a_device(given: list[int]) -> None:
    assert nan_unless_bounds(whole(*given), 7, 5).isnan()
    assert nan_unless_bounds(whole(0, 2, 2, 7, dtype=torch.int32), 7, 5).item() == 0.0
    assert nan_unless_bounds(whole(0), 0, 0).item() == 0.0


def test_an_index_is_compared_before_it_is_narrowed() -> None:
    assert or_else(whole(2**32 + 5, 5, -1), 8, 7).tolist() == [7, 5, 7]
    assert or_else(whole(5, 9, dtype=torch.int32), 8, 7).dtype == torch.int64
