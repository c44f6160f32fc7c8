"""The projector: the original's names, torch's own initialisation from its own generator."""

import pytest
import torch
from torch import nn

from fastllava.errors import UserError
from fastllava.model.projector import Projector


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
    projector = Projector(kind, 6, 10)
    assert list(projector.state_dict()) == names
    state = torch.get_rng_state()
    drawn = projector.draw(11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    linears = [nn.Linear(6 if i == 0 else 10, 10) for i in range(len(names) // 2)]
    expected = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    assert all(torch.equal(drawn[name], tensor) for name, tensor in zip(names, expected, strict=True))
    assert list(drawn) == names
    assert [tuple(w.shape) for w, _ in projector.layers()] == [tuple(linear.weight.shape) for linear in linears]


def test_identity_has_no_weights_and_keeps_the_width():
    projector = Projector("identity", 8, 8)
    assert projector.layers() == []
    assert projector.draw(0) == {}
    with pytest.raises(UserError, match=r"^model\.projector_type: identity needs a tower as wide as the LLM, here 8 and 9"):
        Projector("identity", 8, 9)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "resampler"])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(UserError, match=r"^model\.projector_type: .* is no projector; write linear, identity or mlpNx_gelu"):
        Projector(kind, 8, 8)


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu", "identity"])
def test_every_kind_trains_inside_the_model(tiny, tmp_path, kind):
    clip = {**tiny.CLIP, "hidden_size": tiny.LLM["hidden_size"], "num_attention_heads": 4}
    folder = tiny.write_folder(tmp_path, clip, tiny.clip_tensors(clip))
    model = tiny.load(vision_tower=folder, projector_type=kind, seed=1)
    loss = model(tiny.pack(tiny.mixed()))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.projector.parameters())
    features = model.features(tiny.mixed()[0].images[0][None])
    modules = {"linear": lambda: nn.Linear(32, 32), "identity": nn.Identity}
    reference = modules.get(kind, lambda: nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)))()
    reference.load_state_dict(model.projector.state_dict())
    spliced = model.ops.projector_splice(
        features.flatten(0, 1),
        model.projector.layers(),
        model.llm.model.embed_tokens.weight,
        torch.zeros(tiny.PATCHES, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int32),
        torch.arange(tiny.PATCHES, dtype=torch.int32),
    )
    torch.testing.assert_close(spliced, reference(features[0]))
