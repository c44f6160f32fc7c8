"""The projectors: the names of their files, torch's own initialisation, their references, and how the model runs them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastllava.config import PROJECTORS, ModelConfig
from fastllava.errors import UserError
from fastllava.model.build import rebuilt
from fastllava.model.ops import Ops, reference_ops
from fastllava.model.projectors import KINDS, kind_of
from fastllava.model.projectors.downsample import joined


def projector_of(projector_type, inputs, outputs, patches=16):
    return kind_of(projector_type).build(projector_type, inputs, outputs, patches, reference_ops())


def test_the_config_knows_the_kinds_and_no_others():
    assert list(KINDS) == list(PROJECTORS)
    assert all(name in str(ModelConfig.model_fields["projector_type"].description) for name in KINDS)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_names_are_the_originals_and_a_fresh_one_is_nn_linears(kind, names):
    projector = projector_of(kind, 6, 10)
    assert list(projector.state_dict()) == names
    state = torch.get_rng_state()
    drawn = projector.draw(11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    linears = [nn.Linear(6 if i == 0 else 10, 10) for i in range(len(names) // 2)]
    expected = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    assert all(torch.equal(drawn[name], tensor) for name, tensor in zip(names, expected, strict=True))
    assert list(drawn) == names
    assert [tuple(w.shape) for w, _ in projector.chain()] == [tuple(linear.weight.shape) for linear in linears]


def test_identity_has_no_weights_and_keeps_the_width():
    projector = projector_of("identity", 8, 8)
    assert projector.chain() == []
    assert projector.draw(0) == {}
    with pytest.raises(UserError, match=r"^model\.projector_type: identity needs a tower as wide as the LLM, here 8 and 9"):
        projector_of("identity", 8, 9)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "resampler"])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(
        UserError, match=r"^model\.projector_type: .* is no projector; write one of linear, mlpNx_gelu, identity, mlp_downsample"
    ):
        kind_of(kind)


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu", "identity", "mlp_downsample"])
def test_a_projector_computes_its_reference(kind):
    projector = projector_of(kind, 8, 8).double()
    for name, value in projector.draw(3).items():
        nn.init.normal_(projector.get_parameter(name), mean=float(value.mean()))
    features = torch.randn(2, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = kind_of(kind).reference(dict(projector.named_parameters()), features)
    assert expected.shape == (2, kind_of(kind).tokens(16), 8)
    torch.testing.assert_close(projector(features), expected.flatten(0, 1), rtol=1e-10, atol=1e-12)


def test_downsample_has_vilas_names_and_begins_as_its_modules():
    projector = projector_of("mlp_downsample", 6, 10)
    modules = nn.Sequential(nn.Identity(), nn.LayerNorm(24), nn.Linear(24, 10), nn.GELU(), nn.Linear(10, 10))
    assert [f"layers.{name}" for name in modules.state_dict()] == list(projector.state_dict())
    torch.manual_seed(7)
    modules = nn.Sequential(nn.Identity(), nn.LayerNorm(24), nn.Linear(24, 10), nn.GELU(), nn.Linear(10, 10))
    drawn = projector.draw(7)
    assert all(torch.equal(drawn[f"layers.{name}"], tensor) for name, tensor in modules.state_dict().items())


def test_downsample_joins_neighbours_in_vilas_order():
    """Patches numbered row by row; of each token the numbers of its four, the upper left first, going down the columns of the grid."""
    numbered = torch.arange(36.0).reshape(1, 36, 1)
    expected = [
        [6 * (2 * row + down) + 2 * column + right for down in (0, 1) for right in (0, 1)] for column in range(3) for row in range(3)
    ]
    assert joined(numbered, 6)[0].tolist() == expected


def test_an_odd_grid_is_refused_before_weights_are_read(tiny):
    assert math.isqrt(tiny.PATCHES) % 2
    with pytest.raises(UserError, match=r"^model\.projector_type: mlp_downsample joins 2x2 patches.* 3x3; give .* even grid") as refused:
        tiny.load(projector_type="mlp_downsample", projector="fresh")
    assert "\n" not in str(refused.value)


def loss_and_gradients(model, batch):
    loss = model(batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu", "identity"])
@pytest.mark.parametrize("images", [True, False])
def test_every_chain_trains_inside_the_model_fused_and_separate(tiny, tmp_path, kind, images):
    clip = {**tiny.CLIP, "hidden_size": tiny.LLM["hidden_size"], "num_attention_heads": 4}
    folder = tiny.write_folder(tmp_path, clip, tiny.clip_tensors(clip))
    model = tiny.load(dtype=torch.float64, vision_tower=folder, projector_type=kind, seed=1)
    model.tower.requires_grad_(False)
    ops = Ops(model.chosen | {"projector_splice": "separate"})
    apart = rebuilt(model, replace(model.execution, ops=ops))
    batch = tiny.pack(tiny.mixed() if images else [tiny.mixed()[1]])
    (loss, gradients), (other, others) = (loss_and_gradients(each, batch) for each in (model, apart))
    assert gradients.keys() == others.keys() >= {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-12)
        assert bool(gradient.any()) == (images or not name.startswith("projector."))
    rooms = [set(each.kernels()) & {"projector_splice", "projector_mlp", "splice"} for each in (model, apart)]
    assert rooms == [{"projector_splice"}, {"projector_mlp", "splice"}]


def test_linear_and_identity_are_torchs(tiny):
    features = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    linear, theirs = projector_of("linear", 8, 8), nn.Linear(8, 8)
    linear.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(linear(features), theirs(features[0]))
    assert torch.equal(projector_of("identity", 8, 8)(features), features[0])
