"""What backward computes again: the same bits, whole graphs, and the bytes that are kept, counted tensor by tensor."""

from dataclasses import replace

import pytest
import torch
from kept_bytes import activation_bytes, recomputed_bytes, weight_copy_bytes
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastllava.model.build import rebuilt
from fastllava.model.compiled import for_layers
from fastllava.model.execution import Execution
from fastllava.model.llama import Llama, LlamaConfig
from fastllava.model.ops import Ops, choose_ops
from fastllava.model.weights import load_llava

CPU = torch.device("cpu")
POLICIES = ("none", "norms", "selective", "full")
# What a GPU takes; on a CPU they compute in plain PyTorch (but for fp32, which Triton interprets), and keep what they keep there.
OPS = Ops(
    choose_ops({}, CPU, torch.float32).chosen
    | {"attention": "varlen", "rms_norm": "triton", "add_rms_norm": "triton", "rope": "triton", "swiglu": "triton"}
)


class Live(TorchDispatchMode):
    """Every storage that an op made while this was on; `bytes()` is those that are still held."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self._given = {StorageWeakRef(tensor.untyped_storage()) for tensor in given}
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = StorageWeakRef(storage)
                if key not in self._given:
                    self._made.setdefault(key, storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(size for key, size in self._made.items() if not key.expired())


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("last_layer", ["supervised", "all"])
@pytest.mark.parametrize("ops", ["reference", "gpu"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_same_bits(tiny, frozen, ops, last_layer):
    execution = Execution(OPS if ops == "gpu" else tiny.ops, torch.float64, last_layer=last_layer)
    model = load_llava(tiny.config(projector="fresh"), execution, 5)
    model.tower.requires_grad_(False)
    model.llm.requires_grad_(not frozen)
    for group in ([0, 1, 2, 3], [5]):
        batch = tiny.pack([tiny.mixed()[i] for i in group], weight=0.1)
        expected = loss_and_gradients(model, batch)
        for recompute in POLICIES[1:]:
            found = loss_and_gradients(rebuilt(model, replace(execution, recompute=recompute)), batch)
            assert torch.equal(found[0], expected[0])
            assert found[1].keys() == expected[1].keys()
            assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items()), recompute


@pytest.mark.parametrize("ops", ["reference", "gpu"])
def test_a_graph_that_is_retained(tiny, ops):
    execution = Execution(OPS if ops == "gpu" else tiny.ops, torch.float64, recompute="full")
    model = load_llava(tiny.config(projector="fresh"), execution, 5)
    loss = model(tiny.pack([tiny.mixed()[0]]))
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in model.named_parameters() if p.grad is not None)


# Implementations of rms_norm and of add_rms_norm.
MIXED = [("triton", "reference"), ("reference", "triton"), ("triton", "liger"), ("liger", "triton")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norms", [("triton", "triton"), ("liger", "liger"), *MIXED], ids="-".join)
def test_the_same_bits_of_every_norm(decoder, norms, dtype):
    """In fp32 Triton's kernels run, whose rows add up in another order than the reference's; in bf16 one pass rounds once, two twice."""
    eager, x, _ = decoder
    # The interpreter takes a minute for the other rooms.
    others = {"rope": "reference", "swiglu": "reference"}
    llama = Llama(eager.config, Ops(OPS.chosen | others | {"rms_norm": norms[0], "add_rms_norm": norms[1]}))
    llama.load_state_dict(eager.state_dict())
    given = x.detach().to(dtype).requires_grad_()
    found = {}
    for recompute in POLICIES:
        given.grad = None
        run((llama, given, None), False, recompute, False).float().square().sum().backward()
        found[recompute] = [given.grad, *(parameter.grad for parameter in llama.parameters() if parameter.grad is not None)]
        llama.zero_grad(set_to_none=True)
    for recompute in POLICIES[1:]:
        assert all(map(torch.equal, found[recompute], found["none"])), recompute


class Products(TorchDispatchMode):
    """Counts matrix products and runs of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {"product": 0, "attention": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts["product"] += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm.out)
        self.counts["attention"] += func is torch.ops.fastllava.attention_varlen.default
        return func(*args, **(kwargs or {}))


def config_of(width: int, inner: int, layers: int, heads: int, keys: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, head_dim=width // heads, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False,
        output_bias=False, mlp_bias=False, tied=False, window=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def decoder():
    """Three layers with grouped keys, of random weights; and its input of 200 rows, 37 of them wanted."""
    llama = Llama(config_of(64, 168, 3, 4, 2), OPS)
    generator = torch.Generator().manual_seed(0)
    for parameter in llama.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return llama, torch.randn(200, 64, generator=generator).bfloat16().requires_grad_(), torch.arange(3, 200, 5)[:37]


def run(decoder, frozen, recompute, wanted):
    """The result of a forward in bf16 whose backward is still to come; a decoder that trains keeps its weights in fp32."""
    llama, x, rows = decoder
    llama.to(torch.bfloat16 if frozen else torch.float32).requires_grad_(not frozen)
    return llama(x, torch.arange(200) % 100, torch.tensor([0, 100, 200], dtype=torch.int32), 100, recompute, rows if wanted else None)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_bytes_kept(decoder, frozen, wanted):
    """They lie within 2 % of what is foreseen, and fall from policy to policy as far as there is something to give back."""
    llama, x, _ = decoder
    found = {}
    for recompute in POLICIES:
        llama.to(torch.bfloat16 if frozen else torch.float32)
        with Live(*llama.parameters()) as live:
            out = run(decoder, frozen, recompute, wanted)
            # The layers' input is theirs to keep, and was there before; the result is lm_head's.
            found[recompute] = live.bytes() + x.untyped_storage().nbytes() - out.untyped_storage().nbytes()
            out.sum().backward()
        copies = weight_copy_bytes(llama.config, recompute, torch.bfloat16) if not frozen and recompute == "none" else 0
        expected = activation_bytes(llama.config, 200, recompute, torch.bfloat16, frozen, 37 if wanted else None)
        assert found[recompute] - copies == pytest.approx(expected, rel=0.02), recompute
    kept = [found[recompute] for recompute in POLICIES]
    # A frozen decoder keeps no norm's result for a linear: that policy has nothing to give back there.
    assert kept[0] >= kept[1] > kept[2] > kept[3], found
    assert (kept[0] - kept[1] > 0.15 * kept[0]) == (not frozen)


@pytest.mark.parametrize("recompute", POLICIES)
def test_bytes_while_a_layer_is_computed_again(decoder, recompute):
    """The moment is when backward has reached the last layer's swiglu: by then the whole layer is there again."""
    llama, x, _ = decoder
    found = []

    def look(_: torch.Tensor) -> None:
        found.append(live.bytes() + x.untyped_storage().nbytes())

    def before_down_proj(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].register_hook(look)

    llama.to(torch.bfloat16)
    with Live(*llama.parameters()) as live, llama.model.layers[-1].mlp.down_proj.register_forward_pre_hook(before_down_proj):
        loss = run(decoder, True, recompute, False).sum()
        loss.backward()
    # The final norm has given its input back; the gradients of the layer's result and of swiglu's are there.
    between = 200 * ((64 + 168) * 2 - 64 * 2)
    expected = sum(count(llama.config, 200, recompute, torch.bfloat16, True) for count in (activation_bytes, recomputed_bytes)) + between
    assert found == [pytest.approx(expected, rel=1e-3)]


@pytest.mark.parametrize("recompute", ["norms", "selective"])
def test_a_graph_keeps_the_same_bytes(decoder, recompute):
    eager, *given = decoder
    torch._dynamo.reset()
    llama = Llama(eager.config, OPS, graph=for_layers("layer", "aot_eager"))
    llama.load_state_dict(eager.state_dict())
    llama.to(torch.bfloat16)
    parameters = {parameter.data_ptr() for parameter in llama.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = run((llama, *given), True, recompute, False)
    assert sum(kept.values()) == pytest.approx(activation_bytes(llama.config, 200, recompute, torch.bfloat16, True), rel=1e-3)
    out.sum().backward()


def test_bytes_of_7b_at_16384_rows():
    """The table in fastllava.model.recompute, and the copies of fp32 weights."""
    seven_b = config_of(4096, 11008, 32, 32, 32)
    gib = [activation_bytes(seven_b, 16384, recompute, torch.bfloat16, False) / 2**30 for recompute in POLICIES]
    assert gib == pytest.approx([64.3, 45.5, 24.0, 4.0], abs=0.25)
    assert activation_bytes(seven_b, 16384, "none", torch.bfloat16, True) / 2**30 == pytest.approx(45.5, abs=0.25)
    assert weight_copy_bytes(seven_b, "none", torch.bfloat16) == pytest.approx(2 * 6.476e9, rel=1e-3)
    assert weight_copy_bytes(seven_b, "full", torch.bfloat16) == pytest.approx(2 * 6.476e9 / 32, rel=1e-3)


@pytest.mark.parametrize(("recompute", "products", "attention"), [("none", 0, 0), ("norms", 0, 0), ("selective", 6, 0), ("full", 18, 3)])
def test_products_done_again(decoder, recompute, products, attention):
    with Products() as forward:
        out = run(decoder, True, recompute, True)
    with Products() as backward:
        out.sum().backward()
    assert forward.counts == {"product": 21, "attention": 3}
    assert backward.counts == {"product": 21 + products, "attention": attention}
