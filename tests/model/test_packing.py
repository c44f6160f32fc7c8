"""Packed, one sample at a time and in several micro-batches: the same loss and the same gradients."""

import dataclasses

import pytest
import torch

from fastllava.model.build import rebuilt

PARTS = ("llm", "projector")


@pytest.fixture
def model(tiny):
    model = tiny.load(projector="fresh", seed=5)
    model.tower.requires_grad_(False)
    return model


def loss_and_gradients(model, batches):
    """The sum of the batches' losses, and the gradients they leave by accumulation."""
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        loss = model(batch)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    """The loss and every gradient agree within 1e-5 of the norm."""
    assert torch.isfinite(found[0])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        assert gradient.norm() > 0, name


# The last two lists hold micro-batches without an image, without a supervised row, and without both.
@pytest.mark.parametrize(
    "groups",
    [
        [[0], [1], [2], [3], [4], [5]],
        [[2, 0], [5, 4], [3, 1]],
        [[5, 3, 1], [0, 2, 4]],
        [[1, 5], [0, 2, 3, 4]],
        [[5], [1], [4, 3, 2, 0]],
    ],
)
def test_packing_changes_neither_loss_nor_gradients(tiny, model, groups):
    samples = tiny.mixed()
    whole = loss_and_gradients(model, [tiny.pack(samples, weight=0.125)])
    parts = loss_and_gradients(model, [tiny.pack([samples[i] for i in group], weight=0.125) for group in groups])
    assert_same(parts, whole)


def test_a_sample_does_not_see_its_neighbours(tiny, model):
    samples = tiny.mixed()
    with torch.no_grad():
        alone = model.logits(tiny.pack([samples[2]]))
        among = model.logits(tiny.pack([samples[0], samples[2], samples[1]]))
    torch.testing.assert_close(among[len(model.logits(tiny.pack([samples[0]]))) :][: len(alone)], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("indices", [[1], [5], [5, 5]], ids=["no image", "no image, nothing supervised", "twice"])
def test_without_images_the_projector_gets_zero_gradients(tiny, model, indices):
    samples = tiny.mixed()
    loss, gradients = loss_and_gradients(model, [tiny.pack([samples[i] for i in indices])])
    names = [name for name, _ in model.named_parameters() if name.startswith("projector.")]
    assert len(names) == 4
    assert all(torch.equal(gradients[name], torch.zeros_like(gradients[name])) for name in names)
    assert (loss == 0) == (5 in indices)


def test_without_supervised_rows_everything_gets_zero_gradients(tiny, model):
    sample = tiny.Sample([1, 7, -200, 13], set(), tiny.mixed()[0].images)
    loss, gradients = loss_and_gradients(model, [tiny.pack([sample])])
    assert loss == 0
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_a_tower_that_trains_gets_gradients_and_without_images_zero_ones(tiny, model):
    model.tower.requires_grad_(True)
    samples = tiny.mixed()
    _, with_image = loss_and_gradients(model, [tiny.pack(samples)])
    assert with_image["tower.vision_model.encoder.layers.0.mlp.fc1.weight"].norm() > 0
    _, without = loss_and_gradients(model, [tiny.pack([samples[1]])])
    assert torch.equal(without["tower.vision_model.encoder.layers.0.mlp.fc1.weight"], torch.zeros(24, 16))


def test_a_frozen_decoder_passes_gradients_on_to_the_projector_only(tiny, model):
    everything = loss_and_gradients(model, [tiny.pack(tiny.mixed())])
    model.llm.requires_grad_(False)
    loss, gradients = loss_and_gradients(model, [tiny.pack(tiny.mixed())])
    assert {name.split(".")[0] for name in gradients} == {"projector"}
    assert_same((loss, gradients), (everything[0], {name: everything[1][name] for name in gradients}))


def test_recompute_changes_no_bit(tiny, model):
    batch = tiny.pack(tiny.mixed())
    kept = loss_and_gradients(model, [batch])
    calls = []
    model = rebuilt(model, dataclasses.replace(model.execution, recompute="full"))
    model.llm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    again = loss_and_gradients(model, [batch])
    assert len(calls) == 2
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_patches_that_the_cut_took_away_leave_no_trace(tiny, model):
    """A sample cut inside its image, as the loader lays it out: the lost patches name row T."""
    from dataclasses import replace

    full = tiny.pack([tiny.Sample([1, 7, -200], set(), tiny.mixed()[0].images)])
    kept = 6
    cut = replace(
        full,
        token_ids=full.token_ids[:kept],
        position_ids=full.position_ids[:kept],
        cu_seqlens=torch.tensor([0, kept], dtype=torch.int32),
        max_seqlen=kept,
        patch_rows=full.patch_rows.clamp(max=kept),
    )
    with torch.no_grad():
        torch.testing.assert_close(model.logits(cut), model.logits(full)[:kept], rtol=1e-5, atol=1e-5)


def test_masters_in_fp32_compute_in_the_dtype_of_the_model(tiny):
    """Trained weights are kept in fp32; where they hold bf16 values, loss and gradients are those of the bf16 model."""
    batch = tiny.pack(tiny.mixed())
    rounded = tiny.load(dtype=torch.bfloat16, projector="fresh")
    masters = tiny.load(dtype=torch.bfloat16, projector="fresh")
    masters.llm.float()
    masters.projector.float()
    assert masters.projector.get_parameter("0.weight").dtype == torch.float32
    for model in (rounded, masters):
        model.tower.requires_grad_(False)
    low, high = loss_and_gradients(rounded, [batch]), loss_and_gradients(masters, [batch])
    assert torch.equal(low[0], high[0])
    assert low[0].dtype == torch.float32
    for name, gradient in low[1].items():
        assert high[1][name].dtype == torch.float32
        assert (high[1][name] - gradient.float()).norm() <= 0.02 * gradient.float().norm(), name


def test_bf16_loss_is_near_the_fp32_one(tiny):
    batch = tiny.pack(tiny.mixed(), weight=1 / 17)
    with torch.no_grad():
        exact = tiny.load(projector="fresh", dtype=torch.float32)(batch)
        found = tiny.load(projector="fresh", dtype=torch.bfloat16)(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    assert found != exact


def test_casting_the_model_leaves_rope_and_normalisation_in_fp32(tiny):
    model = tiny.load(projector="fresh", dtype=torch.bfloat16)
    before = model.llm._frequencies.clone(), model._mean_std.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.llm._frequencies, before[0])
    assert torch.equal(model._mean_std, before[1])
    assert not list(model.buffers())


def test_nothing_in_a_step_waits_for_the_device(tiny, model):
    """On the meta device there are no values to wait for: whatever reads one on the host raises."""
    for layer in [*model.llm.model.layers, *model.tower.vision_model.encoder.layers]:
        layer.self_attn.ops.attention = lambda q, k, v, cu_seqlens, max_seqlen, causal: q + k.sum() + v.sum()
    loss = model.to("meta")(tiny.pack(tiny.mixed()).to("meta"))
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None for p in model.llm.parameters())
