"""The decoder's products in fp8, emulated on a CPU: against torchao's own module, in every recompute, and with frozen weights."""

import dataclasses
import sys

import pytest
import torch
from test_recompute import loss_and_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastllava.config import check_config
from fastllava.errors import UserError
from fastllava.model.compiled import whole_graph
from fastllava.model.execution import Execution
from fastllava.model.layers import Linear
from fastllava.model.products import linear
from fastllava.model.weights import load_llava, read_origin
from fastllava.train.machine import check_fp8, check_fp8_widths
from fastllava.train.stages import prepare_stage

float8_linear = pytest.importorskip("torchao.float8.float8_linear", reason="torchao is not installed")
fp8 = pytest.importorskip("fastllava.model.fp8")

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._scaled_mm)
        return func(*args, **(kwargs or {}))


def widened(x):
    """Rows and columns of very different size. Scales that are powers of 2 change only what falls below fp8's range: so it shows
    along which axis they were taken."""
    rows, columns = (torch.logspace(-5, 0, size, dtype=torch.float64)[torch.randperm(size)] for size in x.shape)
    return (x * rows[:, None] * columns).to(x.dtype)


def layer_of(dtype=torch.bfloat16, bias=True, product=linear):
    torch.manual_seed(0)
    layer = Linear(64, 96, bias, product)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer.to(dtype)


def data(rows=50, spread=lambda x: x):
    torch.manual_seed(1)
    x = torch.randn(rows, 64) * torch.logspace(-2, 0, rows)[:, None]
    return spread(x).bfloat16().requires_grad_(), spread(torch.randn(rows, 96)).bfloat16()


def results(layer, x, d_out):
    out = layer(x)
    out.backward(d_out)
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_computes_what_torchaos_module_does(recipe, dtype):
    ours = layer_of(dtype, product=fp8.Fp8Linear(recipe))
    ours.weight.data = widened(ours.weight.data)
    ours.bias.data.zero_()
    theirs = nn.Linear(64, 96, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    config = dataclasses.replace(float8_linear.Float8LinearConfig.from_recipe_name(recipe), emulate=True, pad_inner_dim=True)
    found = results(ours, *data(spread=widened))
    wanted = results(float8_linear.Float8Linear.from_float(theirs, config), *data(spread=widened))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_error_is_that_of_rounding_to_fp8(recipe):
    exact, layer = results(layer_of(), *data()), layer_of(product=fp8.Fp8Linear(recipe))
    for name, a, b in zip(("output", "d_x", "d_weight"), results(layer, *data()), exact, strict=False):
        error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        kept = recipe == "rowwise_with_gw_hp" and name == "d_weight"
        # e4m3 keeps three bits after the first: at most 2 ** -4 an operand, where e5m2 has 2 ** -3.
        assert error < 1e-3 if kept else 0.01 < error < 0.12, f"{name}: {error}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_frozen_weight_costs_two_products_and_keeps_no_input(recipe):
    layer = layer_of(bias=False, product=fp8.Fp8Linear(recipe))
    counts, kept = {}, []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        x, d_out = data()
        kept.clear()
        with Products() as products, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(x).backward(d_out)
        counts[frozen] = products.count
        assert (x.shape in kept) is not frozen
    assert counts == {False: 3, True: 2}


def test_a_batch_without_a_row():
    layer = layer_of(product=fp8.Fp8Linear("rowwise"))
    x, d_out = data(rows=0)
    assert [tuple(each.shape) for each in results(layer, x, d_out)] == [(0, 96), (0, 64), (96, 64), (96,)]
    assert not layer.weight.grad.any()


def called(layer, x):
    return layer(x)


def test_as_one_graph_it_is_the_same():
    eager = layer_of(product=fp8.Fp8Linear("rowwise_with_gw_hp"))
    graph = whole_graph(called, "aot_eager")
    found = []
    for call in (eager, lambda x: graph(eager, x)):
        eager.zero_grad()
        x, d_out = data()
        out = call(x)
        out.backward(d_out)
        found.append([out.detach(), x.grad, *(p.grad for p in eager.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def config_of(tiny, recipe, stage="finetune", **train):
    values = {"stage": stage, "output_dir": "o", "model": tiny.config(projector="fresh"), "data": {"records": "r"}}
    config = check_config(values | {"model": {"llm": "l"}, "train": {"fp8": recipe, **train}})
    return config.model_copy(update={"model": values["model"]})


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_recompute_gives_the_same_bits(tiny, stage):
    batch, found = tiny.pack(tiny.mixed(), weight=0.1), {}
    for recompute in ("none", "norms", "selective", "full"):
        config = config_of(tiny, "tensorwise", stage, recompute=recompute)
        model = load_llava(config.model, Execution.of(config, tiny.ops), 5)
        prepare_stage(model, config)
        found[recompute] = loss_and_gradients(model, batch)
    loss, gradients = found.pop("none")
    assert loss > 0
    for other_loss, other_gradients in found.values():
        assert other_loss == loss
        assert other_gradients.keys() == gradients.keys()
        assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


def test_it_is_the_decoders_layers_alone(tiny):
    config = config_of(tiny, "rowwise")
    model = load_llava(config.model, Execution.of(config, tiny.ops), 5)
    prepare_stage(model, config)
    changed = {name for name, m in model.named_modules() if isinstance(m, Linear) and isinstance(m.product, fp8.Fp8Linear)}
    parts = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    assert changed == {f"llm.model.layers.{layer}.{part}" for layer in range(2) for part in parts}


def test_widths_that_do_not_fit_are_named_before_weights_are_read(tiny):
    config = config_of(tiny, "rowwise")
    llm = read_origin(config.model).llm
    check_fp8_widths(config, llm)
    with pytest.raises(UserError, match=r"train.fp8: 'rowwise' needs multiples of 16, and intermediate_size of model.llm is 40"):
        check_fp8_widths(config, dataclasses.replace(llm, intermediate_size=40))


def test_what_cannot_run_is_named(tiny, monkeypatch):
    config = config_of(tiny, "rowwise")
    check_fp8(config, CPU, world=1)
    with pytest.raises(UserError, match=r"train.fp8: 'rowwise' is for a run of one process, not of 2"):
        check_fp8(config, CPU, world=2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(UserError, match=r"train.fp8: 'rowwise' needs a GPU of compute capability 8.9 or newer, not 8.0"):
        check_fp8(config, torch.device("cuda", 0), world=1)
    with pytest.raises(UserError, match=r"train.fp8: 'rowwise' replaces bf16 products"):
        config_of(tiny, "rowwise", precision="fp32")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "fastllava.model.fp8")
    monkeypatch.delattr("fastllava.model.fp8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"train.fp8: 'rowwise' needs torchao.*pip install -e '\.\[torchao\]'"):
        check_fp8(config, CPU, world=1)
