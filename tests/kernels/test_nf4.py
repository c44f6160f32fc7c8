"""NF4: bits equal to bitsandbytes', what is refused, and the room nf4_linear, which dequantises a part of a weight at a time."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from judging import outputs_and_gradients, rounded
from launches import recorded
from safetensors.torch import load_file
from torch import Tensor
from truths import truth_of

from fastllava_kernels import rooms
from fastllava_kernels._device import dequantise as kernels
from fastllava_kernels._device import nf4 as parts
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import traffic
from fastllava_kernels.nf4 import CODE, Nf4, dequantise, nested_code, quantise, scales
from fastllava_kernels.nf4_linear.kernel_dequantise import DEQUANTISE

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
launches = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="Triton has neither its interpreter nor a GPU")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def recorded_tensors(larger: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = larger / "mix" / "nf4"
    return json.loads((folder / "nf4.json").read_text())["cases"], load_file(folder / "nf4.safetensors")


def assert_same(found: Nf4, codes: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None) -> None:
    assert torch.equal(found.codes.flatten(), codes.flatten())
    assert torch.equal(found.absmax, absmax)
    if nested is not None and offset is not None:
        assert torch.equal(found.nested_absmax, nested)
        assert torch.equal(found.offset.view(()), offset.view(()))


def test_recorded_tensors(larger: Path) -> None:
    cases, tensors = recorded_tensors(larger)
    assert torch.equal(torch.tensor(CODE), tensors["code"])
    assert torch.equal(nested_code(CPU), tensors["nested_code"])
    for name, case in cases.items():
        weight, double = tensors[f"{name}.weight"], case["nested_blocksize"] is not None
        found = quantise(weight, double)
        of_scales = (tensors[f"{name}.nested_absmax"], tensors[f"{name}.offset"]) if double else (None, None)
        assert_same(found, tensors[f"{name}.packed"], tensors[f"{name}.absmax"], *of_scales)
        assert torch.equal(dequantise(found, weight.dtype), tensors[f"{name}.dequantized"])


def crafted(shape: tuple[int, ...], kind: str) -> Tensor:
    weight = drawn(*shape)
    flat = weight.view(-1)
    match kind:
        case "zeros":
            flat[:70] = 0
        case "huge":
            flat *= 1e6
        case "tiny":
            flat *= 1e-35
        case "alike":
            flat.fill_(-0.25)
        case "between codes":
            middles = torch.tensor([(a + b) / 2 for a, b in pairwise(CODE)])
            flat[0] = 1.0
            near = torch.cat((middles, torch.nextafter(middles, torch.ones(15)), torch.nextafter(middles, -torch.ones(15))))
            flat[1 : 1 + min(45, len(flat) - 1)] = near[: min(45, len(flat) - 1)]
    return weight


KINDS = ("usual", "zeros", "huge", "tiny", "alike", "between codes")


@pytest.mark.parametrize("shape", [(64, 64), (33, 128), (5, 38), (1, 2), (7, 9), (129, 257)])
@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_has_the_same_bits(shape: tuple[int, ...], kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for dtype in DTYPES:
        weight = crafted(shape, kind).to(dtype)
        if not weight.isfinite().all():
            continue
        for double in (False, True):
            codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4", quant_storage=torch.uint8)
            found = quantise(weight, double)
            of_scales = (state.state2.absmax, state.offset) if double else (None, None)
            assert_same(found, codes, state.absmax, *of_scales)
            assert torch.equal(dequantise(found, dtype, weight.shape), bnb.dequantize_4bit(codes, state).view(weight.shape))


def test_values_become_their_codes_and_come_back() -> None:
    """Two blocks, the second of zeros only."""
    weight = torch.zeros(2, 64)
    weight[0, :16] = 3.0 * torch.tensor(CODE)
    found = quantise(weight)
    assert found.codes[0, :8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert found.codes[0, 8:].tolist() == found.codes[1, 8:].tolist() == [0x77] * 24
    assert found.absmax.tolist() == [3.0, 0.0]
    assert torch.equal(dequantise(found), weight)


def test_scales_are_quantised_about_their_mean() -> None:
    weight = torch.ones(257, 64) * torch.linspace(0.5, 1.5, 257)[:, None]
    single, double = quantise(weight), quantise(weight, double=True)
    assert torch.equal(single.codes, double.codes)
    assert double.absmax.dtype is torch.uint8
    assert double.nested_absmax.shape == (2,)
    assert double.offset.item() == pytest.approx(1.0)
    assert (scales(double) - single.absmax).abs().max() < 0.01
    # The last one is alone in its block, so it is its own largest.
    assert scales(double)[-1].item() == pytest.approx(1.5, rel=1e-6)
    bits = 8 * sum(tensor.nbytes for tensor in quantise(drawn(1024, 1024), double=True)) / 2**20
    assert bits == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = drawn(3, 64, dtype=torch.bfloat16)
    weight[1, 7] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight)


@pytest.mark.parametrize("shape", [(3, 64), (5, 38), (7,), (3, 5, 7), (1,), (0, 64)])
def test_any_shape_comes_back_within_half_a_step(shape: tuple[int, ...]) -> None:
    weight = drawn(*shape)
    back = dequantise(quantise(weight), shape=shape)
    assert back.shape == weight.shape
    # Values are at most 0.304 apart.
    assert ((back - weight).abs() <= 0.1524 * 0.1).all()


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(33, 38)
    whole = quantise(weight, double=True)
    monkeypatch.setattr("fastllava_kernels.nf4._PIECE", 128)
    assert all(torch.equal(a, b) for a, b in zip(quantise(weight, double=True), whole, strict=True))
    assert torch.equal(dequantise(whole), dequantise(quantise(weight, double=True)))


def on_device(weight: Nf4) -> Nf4:
    return Nf4(*(tensor.to(DEVICE) for tensor in weight))


PARTS = [plain := parts.plain_part, pytest.param(DEQUANTISE.part, marks=launches)]


@pytest.mark.parametrize("part", PARTS, ids=["plain", "triton"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 192), (70, 38), (130, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_part_has_the_bits_of_the_whole(part: parts.Part, double: bool, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight = on_device(quantise(drawn(outputs, inputs), double))
    whole = dequantise(weight, dtype)
    rows = [slice(0, outputs), slice(0, 64), slice(64, outputs)]
    columns = [slice(0, inputs)] if inputs % 64 else [slice(0, inputs), slice(64, inputs), slice(0, 64)]
    for down in rows:
        for across in columns:
            found = part(weight, down, across, dtype)
            assert torch.equal(found, whole[down, across])
            assert found.is_contiguous()


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=launches)])
@pytest.mark.parametrize("inputs", [128, 38])
def test_a_weight_in_many_parts(name: str, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest part is what the planner counts."""
    function = rooms()["nf4_linear"].implementations[name].function
    x, bias = drawn(5, inputs, seed=1).to(DEVICE).requires_grad_(), drawn(200).to(DEVICE)
    weight = on_device(quantise(drawn(200, inputs), double=True))
    expected = outputs_and_gradients(function, (x, *weight, bias))
    monkeypatch.setattr(parts, "AT_ONCE", 64 * inputs)
    seen: list[int] = []
    for owner, attribute in ((parts, "plain_part"), (kernels.Dequantise, "part")):
        monkeypatch.setattr(owner, attribute, noting(getattr(owner, attribute), seen))
    if name == "torch":
        found = [
            parts.forward(parts.plain_part, x.detach(), weight, bias),
            parts.input_gradient(parts.plain_part, torch.ones(5, 200, device=DEVICE), weight),
        ]
        assert torch.allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    else:
        found = outputs_and_gradients(function, (x, *weight, bias))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))
    assert len(seen) >= 5
    assert max(seen) == parts.workspace_bytes(weight.codes, torch.float32)


def noting(function: Callable[..., Tensor], seen: list[int]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        found = function(*args)
        seen.append(found.nbytes)
        return found

    return call


def test_input_gradients_add_up() -> None:
    weight, d_out = quantise(drawn(70, 128)), drawn(5, 70, seed=2)
    before = drawn(5, 128, seed=3)
    into = before.clone()
    found = parts.input_gradient(parts.plain_part, d_out, weight, into)
    assert found is into
    assert torch.allclose(found, before + d_out @ dequantise(weight), rtol=1e-5, atol=1e-6)


def args_of(case: str) -> Any:
    return rounded(truth_of("nf4_linear").CASES[case], torch.float32, torch.float32, DEVICE)


IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=launches)]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nothing_is_saved_for_backward(name: str) -> None:
    args = args_of("usual, scales quantised")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rooms()["nf4_linear"].implementations[name].function(*args)
    assert kept == []


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_opcheck(name: str) -> None:
    args = args_of("a bias")
    assert rooms()["nf4_linear"].implementations[name].function, "whose module defines the ops"
    torch.library.opcheck(getattr(torch.ops.fastllava, f"nf4_linear_{name}"), args)
    torch.library.opcheck(getattr(torch.ops.fastllava, f"nf4_linear_{name}_backward"), (torch.ones(5, 3, device=DEVICE), *args[1:5]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_one_graph_for_every_number_of_rows(name: str) -> None:
    function = rooms()["nf4_linear"].implementations[name].function
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=frames)
    x, *rest = args_of("usual")
    for rows in (2, 3, 5):
        args = (x.detach()[:rows].requires_grad_(), *rest)
        assert all(
            torch.equal(a, b) for a, b in zip(outputs_and_gradients(compiled, args), outputs_and_gradients(function, args), strict=True)
        )
    assert frames.frame_count == 1


@launches
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = recorded(monkeypatch, kernels)
    args = args_of("usual")
    outputs_and_gradients(rooms()["nf4_linear"].implementations["triton"].function, args)
    assert [device for _, device in launched] == [args[1].device] * 2


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_byte_of_codes_is_read_once_and_a_weight_written_once(double: bool) -> None:
    weight, kernel = quantise(drawn(256, 256), double), "nf4_linear.dequantise_double" if double else "nf4_linear.dequantise"
    with traffic.counting() as counter:
        counter.running = kernel
        DEQUANTISE.part(weight, slice(0, 256), slice(0, 256), torch.float16)
    loaded, stored, once = counter.of(kernel)
    assert stored == 2 * 256 * 256
    # A program reads the values of the 16 codes anew, and a block of 64 its scale's value and the scale of that.
    assert loaded == sum(tensor.nbytes for tensor in (weight.codes, weight.absmax)) + 64 * 64 + double * (2 * 4 * 1024 + 4 * 64)
    assert loaded + stored < 1.1 * once


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_lora_linear_takes_quantised_weights_in_place_of_dense_ones(name: str) -> None:
    """One of the layers is, the other is not, and nothing else differs."""
    function = rooms()["lora_linear"].implementations[name].function
    x, dense, quantised = drawn(5, 64, seed=1).requires_grad_(), drawn(8, 64, seed=2), quantise(drawn(6, 64, seed=3), double=True)
    masters = [drawn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(2, 64), (2, 64), (8, 2), (6, 2)], start=4)]
    keys, streams = torch.arange(5), torch.tensor([3, 7])
    found = []
    for weights in ([dense, *quantised], [dense, dequantise(quantised)]):
        outs = function(x, weights, [None, drawn(6)], masters[:2], masters[2:], 2.0, 0.25, keys, streams)
        total = torch.stack([out.square().sum() for out in outs]).sum()
        found.append([*outs, *torch.autograd.grad(total, [x, *masters])])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found, strict=True))
    with pytest.raises(ValueError, match="lora_linear: x is"):
        function(x, [dense, quantised.codes[:, 1:], *quantised[1:]], [None, None], masters[:2], masters[2:], 2.0, 0.25, keys, streams)


@pytest.mark.parametrize("change", ["codes", "absmax", "nested_absmax", "bias"])
def test_sizes_that_do_not_fit_are_refused(change: str) -> None:
    x, codes, absmax, nested, offset, bias = args_of("a bias")
    given = {
        "codes": (x, codes[:, :8], absmax, nested, offset, bias),
        "absmax": (x, codes, absmax[:-1], nested, offset, bias),
        "nested_absmax": (x, codes, absmax.to(torch.uint8), nested, offset, bias),
        "bias": (x, codes, absmax, nested, offset, bias[:-1]),
    }
    for name in ("reference", "torch"):
        with pytest.raises(ValueError, match=r"nf4_linear: .*; given"):
            rooms()["nf4_linear"].implementations[name].function(*given[change])


def test_the_weight_gets_no_gradient() -> None:
    x, codes, absmax, nested, offset, bias = args_of("a bias")
    for name in ("reference", "torch"):
        out = rooms()["nf4_linear"].implementations[name].function(x, codes, absmax, nested, offset, bias.requires_grad_())
        with pytest.raises(RuntimeError, match="nf4_linear: bias_F gets no gradient"):
            out.sum().backward()
