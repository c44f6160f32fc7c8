"""What the kernels of a projector and a splice promise one by one: bounds, 64-bit offsets, devices, tiles, the GELU's digits."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from judging import FP64, distances, draw, outputs_and_gradients, rounded
from launches import recorded
from torch import Tensor
from truths import truth_of

from fastllava_kernels import rooms
from fastllava_kernels._device import linear, plain, rows
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import tuning
from fastllava_kernels.projector_mlp.kernel_linear import LINEAR as MLP
from fastllava_kernels.projector_splice.kernel_place import LINEAR, ROWS

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = pytest.mark.skipif(not CUDA and not INTERPRETED, reason="Triton was loaded without its interpreter and there is no GPU")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).float().to(DEVICE)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def gelu_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative by the kernels: a product with a 1 x 1 matrix."""
    one, nothing = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    _, act = LINEAR.linear_gelu(x[:, None], one, nothing, True)
    slope, again, total = LINEAR.gelu_backward(torch.ones_like(x)[:, None], one, x[:, None])
    assert torch.equal(act, again)
    torch.testing.assert_close(total, slope.sum(0))
    return act[:, 0], slope[:, 0]


def test_gelu_keeps_its_digits_in_the_tails() -> None:
    x = torch.linspace(-8, 8, 513, device=DEVICE)
    true = x.double().requires_grad_()
    # Phi by erfc, which keeps the digits of the lower tail.
    exact = true * torch.special.erfc(-true / 2**0.5) / 2
    (exact_slope,) = torch.autograd.grad(exact.sum(), true)
    act, slope = gelu_of(x)
    assert (act - exact).abs().max() < 5e-7
    assert (slope - exact_slope).abs().max() < 5e-7
    tail = (x >= -6) & (x <= -3)

    def worst(got: Tensor) -> float:
        return ((got - exact)[tail] / exact[tail]).abs().max().item()

    assert worst(act) < 5e-3
    assert worst(0.5 * x * (1 + torch.erf(x / 2**0.5))) > 0.1, "the usual form in fp32"
    assert worst(torch.nn.functional.gelu(x, approximate="tanh")) > 0.1


@pytest.mark.parametrize(("group", "splits"), [(1, 0), (8, 0), (2, 1), (1, 2), (8, 2)])
def test_tiles_in_any_order_and_any_part_give_the_same_bits(splits: int, group: int) -> None:
    x, weight, bias, pre = numbers(70, 40), numbers(45, 40, seed=1), numbers(45, seed=2), numbers(70, 40, seed=3)

    def everything() -> list[Tensor]:
        placed = torch.zeros(75, 45, device=DEVICE)
        LINEAR.linear_place(x, weight, bias, integers(*range(74, 4, -1)), placed)
        straight = MLP.linear(x, weight, bias)
        assert torch.equal(placed[5:].flip(0), straight)
        kept, act = LINEAR.linear_gelu(x, weight, bias, True)
        nothing, same = LINEAR.linear_gelu(x, weight, bias, False)
        assert nothing.numel() == 0
        assert torch.equal(act, same)
        assert torch.equal(kept, straight)
        return [straight, act, *LINEAR.gelu_backward(straight, weight, pre)]

    plain_ones = everything()
    close = distances(plain_ones[2:], [tensor.double() for tensor in plain.gelu_backward(plain_ones[0], weight, pre)])
    assert max(close) < 1e-6
    names = [*LINEAR.kernels, *MLP.kernels]
    usual = tuning.config(tuning.kernels()[names[0]], 70, DEVICE)
    usual.pop("enable_fp_fusion")
    with overridden(names, usual | {"GROUP_M": group, "SPLITS": splits}):
        cut = everything()
    assert all(torch.equal(a, b) for a, b in zip(plain_ones, cut, strict=True))
    # Other tiles: a dot of another size, which may add in another order.
    with overridden(names, usual | {"BLOCK_M": 16, "BLOCK_N": 16, "GROUP_M": group, "SPLITS": min(splits, 1)}):
        smaller = everything()
    assert max(distances(smaller, [tensor.double() for tensor in plain_ones])) < 1e-6


@pytest.mark.parametrize("width", [48, 45])
def test_tiles_that_descriptors_copy_give_the_same_bits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """45 columns do not begin at multiples of 16 bytes: then pointers are taken after all."""
    x, weight, bias, pre = numbers(70, 40), numbers(width, 40, seed=1), numbers(width, seed=2), numbers(70, 40, seed=3)
    made = []
    descriptors = linear._by_descriptors
    monkeypatch.setattr(linear, "_by_descriptors", lambda *args: made.append(descriptors(*args)) or made[-1])

    def everything() -> list[Tensor]:
        placed = torch.zeros(75, width, device=DEVICE)
        LINEAR.linear_place(x, weight, bias, integers(*range(74, 4, -1)), placed)
        straight = MLP.linear(x, weight, bias)
        return [placed, straight, *LINEAR.linear_gelu(x, weight, bias, True), *LINEAR.gelu_backward(straight, weight, pre)]

    plain_ones = everything()
    assert made == [False] * 4
    usual = tuning.config(tuning.kernels()["projector_mlp.linear"], 70, DEVICE)
    usual.pop("enable_fp_fusion")
    with overridden([*LINEAR.kernels, *MLP.kernels], usual | {"TMA": 1}):
        copied = everything()
    assert made[4:] == [True, True, True, width == 48]
    assert all(torch.equal(a, b) for a, b in zip(plain_ones, copied, strict=True))


@contextmanager
def overridden(names: list[str], config: dict[str, int]) -> Iterator[None]:
    if not names:
        yield
        return
    with tuning.override(names[0], config), overridden(names[1:], config):
        yield


def test_memory_around_the_rows_stays_as_it_was() -> None:
    def guarded(height: int, width: int) -> Tensor:
        return torch.full((height + 2, width), torch.nan, device=DEVICE)

    x, weight, bias = numbers(5, 7), numbers(9, 7, seed=1), numbers(9, seed=2)
    out = guarded(6, 9)
    # Two patches are cut, two rows belong to text.
    LINEAR.linear_place(x, weight, bias, integers(0, 6, 3, 5, 6), out[1:7])
    assert out.isfinite().all(1).nonzero().flatten().tolist() == [1, 4, 6]
    assert out[[0, 2, 3, 5, 7]].isnan().all()
    out = guarded(5, 9)
    MLP._linear("linear", x, weight, bias, out[1:6], out[1:6], None)
    assert out[1:6].isfinite().all()
    assert out[[0, 6]].isnan().all()
    out = guarded(6, 9)
    # Columns at both sides too.
    ROWS.scatter_rows(x[:, :5], integers(0, 6, 3, 5, 6), out[1:7, 2:7])
    ROWS.embed_rows(weight[:, :5], torch.arange(6, device=DEVICE), integers(1, 2, 4), out[1:7, 2:7])
    assert torch.equal(out[1:7, 2:7], torch.stack([x[0], weight[1], weight[2], x[2], weight[4], x[3]])[:, :5])
    assert out[[0, 7]].isnan().all()
    assert out[:, [0, 1, 7, 8]].isnan().all()


def test_what_is_beyond_the_rows_is_not_read() -> None:
    """NaN around every operand, and in the columns beside it."""

    def framed(x: Tensor) -> Tensor:
        wide = torch.full([size + 4 for size in x.shape], torch.nan, device=DEVICE)
        inner = wide[tuple(slice(2, size + 2) for size in x.shape)]
        return inner.copy_(x)

    x, d_out = framed(numbers(37, 21)), framed(numbers(50, 21, seed=1))
    weight, bias = numbers(19, 21, seed=2), framed(numbers(19, seed=3))
    pre, act = LINEAR.linear_gelu(x, weight, bias, True)
    assert pre.isfinite().all()
    assert act.isfinite().all()
    back = LINEAR.gelu_backward(x, numbers(21, 19, seed=4), pre)
    assert all(tensor.isfinite().all() for tensor in back)
    gathered, total = ROWS.gather_rows(d_out, integers(3, 50, *range(10, 45)), True)
    assert torch.equal(gathered[1], torch.zeros(21, device=DEVICE))
    torch.testing.assert_close(total, gathered.sum(0), rtol=1e-5, atol=1e-5)
    ids = torch.arange(50, device=DEVICE) % 3
    gradient = ROWS.embedding_gradient(d_out, numbers(4, 21), ids, integers(*range(50)))
    assert torch.equal(gradient[3], torch.zeros(21, device=DEVICE))
    torch.testing.assert_close(gradient[1], d_out[1::3].sum(0), rtol=1e-5, atol=1e-5)


def test_embedding_gradient_is_summed_in_the_order_of_the_rows_whatever_the_other_tokens() -> None:
    """So the same bits in any run; and in fp32: 4,096 halves of which half precision would lose most."""
    source = torch.full((4097, 1), 2.0**-12, dtype=torch.float16, device=DEVICE)
    source[0] = 1.0
    ids = torch.zeros(4097, dtype=torch.int64, device=DEVICE)
    table = torch.zeros(1, 1, dtype=torch.float16, device=DEVICE)
    with tuning.override("projector_splice.segment_sum", {"BLOCK_ROWS": 512, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}):
        assert ROWS.embedding_gradient(source, table, ids, torch.arange(4097, device=DEVICE).int()).item() == 2.0
    values, where = numbers(60, 3), torch.randperm(60, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    alone = ROWS.embedding_gradient(values, numbers(7, 3), torch.full((60,), 5, device=DEVICE), where[:31])
    beside = torch.full((60,), 5, device=DEVICE)
    beside[where[31:].long()] = torch.arange(29, device=DEVICE) % 5
    together = ROWS.embedding_gradient(values, numbers(7, 3), beside, where)
    assert torch.equal(alone[5], together[5])


def test_many_repetitions_beside_single_tokens() -> None:
    ids = torch.tensor([2] * 40 + [0] + [3] * 16 + [6] * 17 + [5], device=DEVICE)[
        torch.randperm(75, generator=torch.Generator().manual_seed(3))
    ]
    values = numbers(75, 37)
    found = ROWS.embedding_gradient(values, torch.zeros(8, 37, device=DEVICE), ids, integers(*range(75)))
    assert max(distances([found], [torch.zeros(8, 37, dtype=FP64).index_add_(0, ids.cpu(), values.double().cpu())])) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "scatter", "embed"])
def test_rows_are_written_beyond_2_to_the_31_elements(vast: Tensor, kind: str) -> None:
    """At a row whose offset is 2**32 elements, which is 0 in 32 bits."""
    ones, identity = torch.ones(1, 16, dtype=torch.float16), torch.eye(16, dtype=torch.float16)
    far, stride = (2**28, 16) if kind == "linear" else (4, 2**30)
    out = vast.as_strided((far + 1, 16), (stride, 1))
    out[[0, far]] = 0.0
    if kind == "linear":
        LINEAR.linear_place(ones, identity, torch.zeros(16), integers(far), out)
    elif kind == "scatter":
        ROWS.scatter_rows(ones, integers(far), out)
    else:
        ROWS.embed_rows(ones, torch.zeros(5, dtype=torch.int64), integers(far), out)
    assert torch.equal(out[0], torch.zeros(16, dtype=torch.float16))
    assert torch.equal(out[far], torch.ones(16, dtype=torch.float16))


def test_rows_are_read_beyond_2_to_the_31_elements(vast: Tensor) -> None:
    source = vast.as_strided((5, 16), (2**30, 1))
    source[[0, 4]] = torch.tensor([[0.0], [1.0]], dtype=torch.float16)
    gathered, _ = ROWS.gather_rows(source, integers(4), False)
    gradient = ROWS.embedding_gradient(source, torch.zeros(1, 16), torch.zeros(5, dtype=torch.int64), integers(4))
    assert torch.equal(gathered, torch.ones(1, 16, dtype=torch.float16))
    assert torch.equal(gradient, torch.ones(1, 16))


@pytest.mark.parametrize("room", ["projector_splice", "projector_mlp", "splice"])
def test_kernels_run_on_the_device_of_their_tensors(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = recorded(monkeypatch, linear, rows)
    case = next(iter(truth_of(room).CASES.values()))
    outputs_and_gradients(rooms()[room].implementations["triton"].function, rounded(case, torch.float32, torch.float32, DEVICE))
    assert len(launched) >= 3
    assert {device for _, device in launched} == {torch.empty(0, device=DEVICE).device}
