"""The implementations of room attention: ops, masks, PyTorch's switch, and what each library is given.

Without a GPU the ops over FlashAttention run eager.py; what they hand to a library is shown with that library's function
replaced by one that computes from those very arguments.
"""

import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from judging import FP64, draw, leaves, outputs_and_gradients, rounded
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from truths import truth_of
from truths.attention import attention_inputs

from fastllava_kernels import choose, rooms
from fastllava_kernels.attention import availability, eager, flash, xformers_op
from fastllava_kernels.attention.flash import Packed
from fastllava_kernels.attention.repeats import repeats
from fastllava_kernels.attention.varlen_op import Varlen
from fastllava_kernels.room import REFERENCE, Sizes

ROOM = rooms()["attention"]
CASES = truth_of("attention").CASES
OPS = ["sdpa", "varlen", "fa3", "fa4", "xformers"]
FLASH = [name for name in OPS if name != "sdpa"]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def function(name: str) -> Any:
    return ROOM.implementations[name].function


def op(name: str) -> Any:
    assert ROOM.implementations[name], "loading it defines the op"
    return getattr(torch.ops.fastllava, f"attention_{name}").default


def case(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return rounded(CASES[name], dtype, dtype)


def learning_nothing(args: Any) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in args)


@pytest.mark.parametrize("name", CASES)
def test_written_out_attention_is_the_reference(name: str) -> None:
    """eager.py's two passes in fp64, so that the ops over libraries may be judged by them."""
    args = rounded(CASES[name], FP64, FP64)
    q, k, v, cu_seqlens, _, causal = args
    out, *expected = outputs_and_gradients(function(REFERENCE), args)
    got, lse = eager.forward(q.detach(), k.detach(), v.detach(), cu_seqlens, causal)
    grads = eager.backward(draw(*out.shape, seed=99), q.detach(), k.detach(), v.detach(), cu_seqlens, causal)
    for one, other in zip((got, *grads), (out, *expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert lse.shape == (q.shape[1], q.shape[0])


def test_log_of_the_sum_of_exponentials() -> None:
    q, k, v, cu_seqlens, _, _ = rounded(attention_inputs([3], 4, 2, True), FP64, FP64)
    _, lse = eager.forward(q, k, v, cu_seqlens, True)
    scores = (q[2, 3] * k[:, 1]).sum(-1) * 8**-0.5
    torch.testing.assert_close(lse[3, 2], scores.exp().sum().log())


@pytest.mark.parametrize("name", OPS)
def test_ops_pass_opcheck(name: str) -> None:
    args = case("grouped")
    torch.library.opcheck(op(name), args)
    q, k, v, cu_seqlens, max_seqlen, causal = learning_nothing(args)
    backward = getattr(torch.ops.fastllava, f"attention_{name}_backward").default
    if name == "sdpa":
        torch.library.opcheck(backward, (torch.ones_like(q), q, k, v, cu_seqlens, causal))
    else:
        out, lse = op(name)(q, k, v, cu_seqlens, max_seqlen, causal)
        torch.library.opcheck(backward, (torch.ones_like(q), q, k, v, out, lse, cu_seqlens, max_seqlen, causal))


@pytest.mark.parametrize("name", OPS)
def test_retained_graph_double_use_and_layout(name: str) -> None:
    args = case("grouped")
    before = [x.detach().clone() for x in args[:4]]
    out = function(name)(*args)
    cotangent = draw(*out.shape).float()
    given = cotangent.clone()
    first = [x.clone() for x in torch.autograd.grad(out, leaves(args), cotangent, retain_graph=True)]
    second = torch.autograd.grad(out, leaves(args), cotangent)
    twice = torch.autograd.grad(function(name)(*args) + function(name)(*args), leaves(args), cotangent)
    strided = tuple(x.detach().mT.contiguous().mT.requires_grad_() for x in args[:3])
    assert not strided[0].is_contiguous()
    moved = torch.autograd.grad(function(name)(*strided, *args[3:]), strided, cotangent.mT.contiguous().mT)
    for one, again, double, other in zip(first, second, twice, moved, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(double, 2 * one)
        torch.testing.assert_close(other, one)
    assert torch.equal(cotangent, given)
    assert all(torch.equal(x, y) for x, y in zip(args[:4], before, strict=True))


@pytest.mark.parametrize("name", ["sdpa", "varlen"])
def test_traces_into_one_graph_for_every_packing(name: str) -> None:
    torch._dynamo.reset()
    frames = CompileCounter()
    compiled = torch.compile(function(name), fullgraph=True, backend=frames)
    for lengths in ([3, 2], [9, 4, 1], [2, 7, 5, 4], [6], [8, 8]):
        args = rounded(attention_inputs(lengths, 4, 2, True), torch.float32, torch.float32)
        assert torch.equal(compiled(*args), function(name)(*args))
    # One for the first packing, one for all others, and one for a packing of one sample only in cu_seqlens [2].
    assert frames.frame_count <= 3


def test_reference_is_not_for_a_graph_and_sdpa_takes_its_place() -> None:
    for compiled, chosen in ((False, REFERENCE), (True, "sdpa")):
        assert choose(ROOM, "auto", CPU, torch.float32, compiled) == chosen
    with pytest.raises(ValueError, match=re.escape("'reference' cannot run here (it reads the samples' lengths on the host)")):
        choose(ROOM, REFERENCE, CPU, torch.float32, compiled=True)


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_on_a_cpu_is_refused_with_the_reason(name: str) -> None:
    message = f"kernels.attention: '{name}' cannot run here (FlashAttention needs a CUDA GPU); write kernels.attention=auto"
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(ROOM, name, CPU, torch.bfloat16)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    forget()
    yield
    forget()


def forget() -> None:
    """What was found of packages that tests stand in for."""
    for found in (availability._trouble, availability._flash_4_orders_on_9, availability._xformers_runs_pytorchs):
        getattr(found, "cache_clear", lambda: None)()


def installed(monkeypatch: pytest.MonkeyPatch, *names: str, orders: bool = True) -> None:
    """Stand-ins for packages of FlashAttention; `orders`: version 4's backward for compute capability 9.x has an order to ask for."""
    forget()
    if "fa3" in names:
        monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
        monkeypatch.setattr(availability, "_flash_3_has_backward", lambda: True)
    if "fa4" in names:
        names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn.cute.flash_bwd_sm90")
        modules = {name: ModuleType(name) for name in names}

        class Ordered:
            def __init__(self, dtype: Any, deterministic: bool = False) -> None: ...

        class Unordered:
            def __init__(self, dtype: Any) -> None: ...

        vars(modules["flash_attn.cute.flash_bwd_sm90"])["FlashAttentionBackwardSm90"] = Ordered if orders else Unordered
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("packages", "chosen"),
    [((), "varlen"), (("fa3",), "fa3"), (("fa4",), "fa4"), (("fa3", "fa4"), "fa3")],
    ids=["none", "fa3", "fa4", "both"],
)
@pytest.mark.parametrize("repeats", [False, True], ids=["any order", "one order"])
def test_the_newest_flash_attention_that_is_installed(
    packages: tuple[str, ...], chosen: str, repeats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, *packages)
    for compiled in (False, True):
        assert choose(ROOM, "auto", GPU, torch.bfloat16, compiled, repeats=repeats) == chosen
        assert choose(ROOM, "auto", GPU, torch.float32, compiled, repeats=repeats) == ("sdpa" if compiled else REFERENCE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose(ROOM, "auto", GPU, torch.bfloat16, repeats=repeats) == "varlen"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert choose(ROOM, "auto", GPU, torch.bfloat16, repeats=repeats) == ("fa4" if "fa4" in packages else "varlen")


@pytest.mark.usefixtures("h100")
def test_wide_heads_pass_flash_attention_4_by(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "fa4")
    assert choose(ROOM, "auto", GPU, torch.bfloat16, sizes=Sizes({"the decoder": 128, "the tower": 72})) == "fa4"
    assert choose(ROOM, "auto", GPU, torch.bfloat16, sizes=Sizes({"the decoder": 256})) == "varlen"


@pytest.mark.usefixtures("h100")
def test_one_order_of_additions_is_refused_by_what_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fmha = pytest.importorskip("xformers.ops.fmha")
    installed(monkeypatch, "fa4", orders=False)
    assert choose(ROOM, "auto", GPU, torch.bfloat16) == "fa4"
    assert choose(ROOM, "auto", GPU, torch.bfloat16, repeats=True) == "varlen"
    assert choose(ROOM, "fa4", GPU, torch.bfloat16) == "fa4"
    with pytest.raises(ValueError, match=r"'fa4' cannot run here \(the installed FlashAttention 4 has no backward with one order"):
        choose(ROOM, "fa4", GPU, torch.bfloat16, repeats=True)
    # A GPU for which it has had an order from the start.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert choose(ROOM, "auto", GPU, torch.bfloat16, repeats=True) == "fa4"
    monkeypatch.setattr(availability, "_xformers_has_flash", lambda: True)
    for pytorchs in (True, False):
        monkeypatch.setattr(fmha.flash, "_USE_PT_FLASH_ATTN", pytorchs)
        availability._xformers_runs_pytorchs.cache_clear()
        if pytorchs:
            assert choose(ROOM, "xformers", GPU, torch.bfloat16, repeats=True) == "xformers"
        else:
            with pytest.raises(ValueError, match="xformers never asks FlashAttention's packages for one order of additions"):
                choose(ROOM, "xformers", GPU, torch.bfloat16, repeats=True)


@pytest.mark.usefixtures("h100")
def test_a_package_that_cannot_be_loaded_is_named_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('undefined symbol: made for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    assert choose(ROOM, "auto", GPU, torch.bfloat16) == "varlen"
    with pytest.raises(ValueError, match=r"FlashAttention 3 cannot be loaded \(undefined symbol: made for another torch\): build it"):
        choose(ROOM, "fa3", GPU, torch.bfloat16)
    (tmp_path / "flash_attn_interface.py").write_text("import no_such_library")
    availability._trouble.cache_clear()
    with pytest.raises(ValueError, match=r"FlashAttention 3 cannot be loaded \(No module named 'no_such_library'\)"):
        choose(ROOM, "fa3", GPU, torch.bfloat16)
    (tmp_path / "flash_attn_interface.py").write_text("")
    availability._trouble.cache_clear()
    with pytest.raises(ValueError, match="the installed FlashAttention 3 was built without backward"):
        choose(ROOM, "fa3", GPU, torch.bfloat16)


@pytest.mark.usefixtures("h100")
def test_what_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(ROOM, "auto", GPU, torch.bfloat16) == "varlen"
    assert choose(ROOM, "auto", GPU, torch.bfloat16, compiled=True) == "varlen"
    # FlashAttention has no fp32: auto keeps the precision that was asked for.
    assert choose(ROOM, "auto", GPU, torch.float32) == REFERENCE
    assert choose(ROOM, "auto", GPU, torch.float32, compiled=True) == "sdpa"
    with pytest.raises(ValueError, match="FlashAttention computes in bf16 or fp16, not float32"):
        choose(ROOM, "varlen", GPU, torch.float32)
    monkeypatch.setattr(availability, "_trouble", lambda module: "is not installed")
    remedies = {"fa3": "build it in the folder hopper of", "fa4": "pip install flash-attn-4", "xformers": "pip install xformers"}
    for name, remedy in remedies.items():
        with pytest.raises(ValueError, match=re.escape(f"is not installed: {remedy}")):
            choose(ROOM, name, GPU, torch.bfloat16)
    monkeypatch.setattr(availability, "_trouble", lambda module: None)
    monkeypatch.setattr(availability, "_flash_3_has_backward", lambda: True)
    assert choose(ROOM, "fa3", GPU, torch.bfloat16) == "fa3"
    monkeypatch.setattr(availability, "_xformers_has_flash", lambda: False)
    with pytest.raises(ValueError, match="the installed xformers has no FlashAttention for this PyTorch"):
        choose(ROOM, "xformers", GPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=re.escape("FlashAttention 3 needs compute capability 9.x, this GPU has 8.x")):
        choose(ROOM, "fa3", GPU, torch.bfloat16)
    with pytest.raises(ValueError, match=re.escape("FlashAttention 4 needs compute capability 9.x or 10.x, this GPU has 8.x")):
        choose(ROOM, "fa4", GPU, torch.bfloat16)


def test_heads_that_flash_attention_cannot_take_are_refused_with_the_remedy() -> None:
    q, cu_seqlens = torch.zeros(2, 1, 12), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="'varlen' takes heads whose width is a multiple of 8 up to 256, not 12; write kernels"):
        function("varlen")(q, q, q, cu_seqlens, 2, True)


@pytest.fixture
def switched(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """PyTorch's switch, replaced by a list of what was turned on; the last is on."""
    turned: list[str | None] = [None]
    monkeypatch.setattr(flash, "current_flash_attention_impl", lambda: turned[-1])
    monkeypatch.setattr(flash, "activate_flash_attention_impl", turned.append)
    monkeypatch.setattr(flash, "restore_flash_attention_impl", lambda: turned.append(None))
    return turned


def test_the_switch_is_turned_only_when_it_must_and_back_again(switched: list[str | None]) -> None:
    for wanted in (None, "FA3", "FA3", "FA4", None, None):
        flash.activate(wanted)
    assert switched == [None, "FA3", "FA4", None]


@pytest.fixture
def as_if_on_gpu(monkeypatch: pytest.MonkeyPatch, switched: list[str | None]) -> dict[str, Any]:
    """varlen_attn and its backward by eager.py, from the arguments that they were given, which are kept."""
    import torch.nn.attention.varlen as module

    given: dict[str, Any] = {}

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, return_aux: Any, window_size: Any,
        enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        given["forward"] = (max_q, max_k)
        assert torch.equal(cu_q, cu_k)
        assert return_aux.lse
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return eager.forward(q, k, v, cu_q, window_size == (-1, 0))

    def backward(*args: Any) -> Any:
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, rng_state, scale, window = args
        given["backward"] = (max_q, max_k, scale, window)
        assert torch.equal(cu_q, cu_k)
        assert causal == (window == [-1, 0])
        assert rng_state.dtype is torch.uint64
        expected = eager.forward(q, k, v, cu_q, causal)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
        return eager.backward(grad, q, k, v, cu_q, causal)

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    schema = torch.ops.torch_attn._varlen_attn_backward.default._schema
    assert [argument.name for argument in schema.arguments] == [
        *("grad_out", "query", "key", "value", "out", "lse", "cu_seq_q", "cu_seq_k"),
        *("max_q", "max_k", "is_causal", "rng_state", "scale", "window_size"),
    ]
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn_backward", backward)
    return given


@pytest.mark.parametrize("name", ["ragged", "ragged, not causal", "grouped"])
@pytest.mark.parametrize(("switch", "library"), [(None, Varlen(None)), ("FA3", Varlen("FA3")), ("FA4", Varlen("FA4"))])
def test_varlen_attn_is_given_what_it_wants(
    name: str, switch: str | None, library: flash.Library, as_if_on_gpu: dict[str, Any], switched: list[str | None]
) -> None:
    q, k, v, cu_seqlens, max_seqlen, causal = case(name)
    expected = outputs_and_gradients(function(REFERENCE), (q, k, v, cu_seqlens, max_seqlen, causal))
    q, k, v = q.detach(), k.detach(), v.detach()
    packed = Packed(q, k, v, cu_seqlens, max_seqlen, causal)
    out, lse = library.forward(packed)
    assert switched[-1] == switch
    flash.activate("another")
    grads = library.backward(draw(*out.shape, seed=99).float(), packed, out, lse)
    assert switched[-1] == switch
    assert as_if_on_gpu["forward"] == as_if_on_gpu["backward"][:2] == (max_seqlen, max_seqlen)
    for one, other in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_grouped_heads_on_pytorch_2_11(as_if_on_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its varlen_attn has no argument for them and takes them as they are."""
    import torch.nn.attention.varlen as module

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, return_aux: Any = None,
                    scale: Any = None, window_size: Any = (-1, -1)) -> Any:  # fmt: skip
        return eager.forward(q, k, v, cu_q, window_size == (-1, 0))

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    q, k, v, cu_seqlens, max_seqlen, causal = case("grouped")
    out, _ = Varlen(None).forward(Packed(q.detach(), k.detach(), v.detach(), cu_seqlens, max_seqlen, causal))
    torch.testing.assert_close(out, function(REFERENCE)(q, k, v, cu_seqlens, max_seqlen, causal))


@pytest.mark.parametrize("version", ["3", "4"])
@pytest.mark.parametrize("wanted", [False, True], ids=["any order", "one order"])
def test_pytorch_hands_its_switch_on_to_the_package(version: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own code between its op and the package's, on a CPU: which order of additions the package's backward is asked for."""
    module = importlib.import_module(f"torch.nn.attention._fa{version}")
    asked: list[bool] = []

    def backward_of_3(*args: Any) -> None:
        asked.append(args[-2])

    def backward_of_4(*args: Any, deterministic: bool, **_: Any) -> Any:
        asked.append(deterministic)
        return args[:3]

    monkeypatch.setattr(module, f"_fa{version}_backward_support_error", lambda *_: None)
    monkeypatch.setattr(torch._C, "_get_sm_carveout_experimental", lambda: None)
    if version == "3":
        monkeypatch.setattr(module, "_FA3_CUDA_BWD", backward_of_3)
    else:
        monkeypatch.setattr(module, "_FA4_MODULE_PATH", "a path")
        monkeypatch.setattr(module, "_fa4_import_module", lambda path: SimpleNamespace(_flash_attn_bwd=backward_of_4))
    x, lse, bounds = torch.zeros(2, 1, 8), torch.zeros(1, 2), torch.tensor([0, 2], dtype=torch.int32)
    backward = getattr(module, f"_fa{version}_flash_attention_backward_impl")
    torch.use_deterministic_algorithms(wanted)
    try:
        backward(x, x, x, x, x, lse, bounds, bounds, 2, 2, 0.0, True, bounds, bounds)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [wanted]


def test_what_repeats_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("fastllava_kernels.attention.repeats"), "_LENGTHS", (5, 1, 9))

    def wandering(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        noise = next(steps)
        return q * (1 + noise) + 0 * (k.sum() + v.sum())

    steps = itertools.cycle([0.0, 0.0, 0.0, 2.0**-20])
    assert repeats(function("varlen"), CPU, torch.float32, 8)
    assert not repeats(wandering, CPU, torch.float32, 8)


@pytest.mark.parametrize("name", ["ragged", "ragged, not causal", "grouped"])
def test_xformers_is_given_what_it_wants(name: str, monkeypatch: pytest.MonkeyPatch, switched: list[str | None]) -> None:
    fmha = pytest.importorskip("xformers.ops.fmha")
    q, k, v, cu_seqlens, max_seqlen, causal = case(name)
    expected = outputs_and_gradients(function(REFERENCE), (q, k, v, cu_seqlens, max_seqlen, causal))
    q, k, v = q.detach(), k.detach(), v.detach()
    forward, backward = fmha.flash.FwOp, fmha.flash.BwOp
    assert xformers_op.operators() == (forward, backward)

    def apply_forward(inputs: Any, needs_gradient: bool) -> Any:
        converted, cu_q, max_q, _, max_k, _ = fmha.flash._convert_input_format(inputs, supports_mqa=True)
        assert converted.key.shape == k.shape
        assert (max_q, max_k) == (max_seqlen, max_seqlen)
        reasons = forward.not_supported_reasons(inputs)
        assert not [reason for reason in reasons if "mask" in reason.lower() or "bias" in reason.lower() or "GQA" in reason], reasons
        out, lse = eager.forward(converted.query, converted.key, converted.value, cu_q, fmha.flash._is_causal(inputs.attn_bias))
        shape = inputs.query.shape
        return out.reshape(shape), fmha.Context(out=out, lse=fmha.flash._post_process_lse(lse, inputs, tuple(shape)))

    def kernel(*args: Any, **options: Any) -> Any:
        _, grad, q_, k_, v_, _, lse, cu_q, _, max_q, max_k, *_, is_causal = args
        assert (max_q, max_k) == (max_seqlen, max_seqlen)
        assert lse.shape == (q.shape[1], q.shape[0])
        return eager.backward(grad, q_, k_, v_, cu_q, is_causal)

    monkeypatch.setattr(forward, "apply", apply_forward)
    monkeypatch.setattr(fmha, "_ensure_op_supports_or_raise", lambda *_: None)
    monkeypatch.setattr(backward, "OPERATOR", kernel)
    monkeypatch.setattr(backward, "SUPPORTED_DTYPES", {torch.float32})
    library = xformers_op.Xformers()
    switched.append("FA3")
    packed = Packed(q, k, v, cu_seqlens, max_seqlen, causal)
    out, lse = library.forward(packed)
    grads = library.backward(draw(*out.shape, seed=99).float(), packed, out, lse)
    assert switched[-1] is None
    for one, other in zip((out, *grads), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FLASH)
def test_shapes_on_a_gpu_that_is_not_there(name: str) -> None:
    # No autograd, whose engine wants the device itself.
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(6, 4, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.empty(6, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cu_seqlens = torch.empty(3, device="cuda", dtype=torch.int32)
        out, lse = op(name)(q, k, v, cu_seqlens, 4, True)
        grads = getattr(torch.ops.fastllava, f"attention_{name}_backward")(out, q, k, v, out, lse, cu_seqlens, 4, True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype) == ((4, 6), torch.float32)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@on_gpu
@pytest.mark.parametrize("name", FLASH)
def test_same_bits_twice_on_a_gpu_and_samples_may_change_places(name: str) -> None:
    """Eight samples of up to 700 rows: several blocks each, which FlashAttention's backward may add in any order."""
    if ROOM.implementations[name].unsupported(GPU, torch.bfloat16) is not None:
        pytest.skip(f"{name} does not run here")
    if ROOM.implementations[name].unordered(GPU) is not None:
        pytest.skip(f"{name} has no order of additions here")
    lengths = [700, 1, 333, 64, 128, 500, 17, 257]
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(sum(lengths), heads, 64, generator=generator).bfloat16().cuda() for heads in (8, 2, 2, 8))

    def run(order: list[int]) -> list[list[Tensor]]:
        """Output and gradients, a list a tensor, in samples as they were at first."""
        parts = [torch.cat([x.split(lengths)[i] for i in order]).requires_grad_() for x in (q, k, v, grad)]
        moved = [lengths[i] for i in order]
        cu_seqlens = torch.tensor([0, *moved], device="cuda").cumsum(0).int()
        out = function(name)(*parts[:3], cu_seqlens, max(moved), True)
        tensors = [out, *torch.autograd.grad(out, parts[:3], parts[3].detach())]
        return [[x.split(moved)[order.index(i)].detach() for i in range(len(order))] for x in tensors]

    torch.use_deterministic_algorithms(True)
    try:
        once, again, turned = run(list(range(8))), run(list(range(8))), run(list(range(7, -1, -1)))
        assert repeats(function(name), GPU, torch.bfloat16, 128)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, same, other in zip(once, again, turned, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, same, strict=True))
        assert all(torch.allclose(x, y, rtol=2e-2, atol=2e-2) for x, y in zip(one, other, strict=True))
