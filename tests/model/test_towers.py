"""Towers other than CLIP-L/14 at 336 pixels against transformers: features, files they are read from, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from fastllava.batch import ImageSpec
from fastllava.errors import UserError
from fastllava.model import hf_reference
from fastllava.model.llava import normalise
from fastllava.model.towers import TOWERS
from fastllava.model.towers import SiglipConfig as OurSiglip
from fastllava.model.weights.layouts import to_ours
from fastllava.model.weights.tower_configs import image_spec, tower_config

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES = {"siglip-224-16": (32, 8), "siglip-384-14": (26, 4), "clip-224-14": (28, 7), "clip-224-32": (24, 12)}
"""Towers of these names' shapes, small: sides of an image and a patch; 26 is no multiple of 4, as 384 is none of 14."""


def randomised(module, seed=3):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def towers(name, **given):
    side, patch = SIZES[name]
    config, model = (SiglipVisionConfig, SiglipVisionModel) if name.startswith("siglip") else (CLIPVisionConfig, CLIPVisionModel)
    return randomised(model(config(**SMALL, image_size=side, patch_size=patch, **given)))


def pixels_of(side, count=2):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("select_layer", [-1, -2, -4, 2])
def test_features_are_transformers_hidden_states(tiny, tmp_path, name, select_layer):
    theirs = towers(name)
    theirs.save_pretrained(tmp_path)
    model = tiny.load(vision_tower=tmp_path, select_layer=select_layer)
    side, patch = SIZES[name]
    pixels = pixels_of(side)
    normalised = normalise(pixels, torch.tensor(model.spec.mean), torch.tensor(model.spec.std))
    with torch.no_grad():
        first = 1 if name.startswith("clip") else 0
        expected = theirs(normalised, output_hidden_states=True).hidden_states[select_layer][:, first:]
        found = model.features(pixels)
        reference = hf_reference.tower(model, dict(model.named_parameters()).__getitem__, torch.float32)
        again = reference(normalised, output_hidden_states=True).hidden_states[select_layer][:, first:]
    assert found.shape == (2, (side // patch) ** 2, SMALL["hidden_size"])
    assert model.spec.patches == (side // patch) ** 2
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (again - expected).norm() <= 1e-5 * expected.norm()


def test_the_last_hidden_state_is_before_the_last_norm(tiny, tmp_path):
    """As transformers counts hidden_states of a SigLIP: the norm makes last_hidden_state of the last of them."""
    theirs = towers("siglip-224-16")
    theirs.save_pretrained(tmp_path)
    model = tiny.load(vision_tower=tmp_path, select_layer=-1)
    pixels = pixels_of(32)
    with torch.no_grad():
        out = theirs(normalise(pixels, torch.full((3,), 0.5), torch.full((3,), 0.5)), output_hidden_states=True)
    assert not torch.allclose(out.last_hidden_state, out.hidden_states[-1], atol=1e-2)
    torch.testing.assert_close(model.features(pixels), out.hidden_states[-1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_activations_of_siglip(tiny, tmp_path, act):
    theirs = towers("siglip-224-16", hidden_act=act)
    theirs.save_pretrained(tmp_path)
    pixels = pixels_of(32)
    with torch.no_grad():
        expected = theirs(pixels / 127.5 - 1, output_hidden_states=True).hidden_states[-2]
        found = tiny.load(vision_tower=tmp_path).features(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_a_whole_siglip_its_vision_half_and_every_spelling_give_the_same_tower(tiny, tmp_path):
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 8, "projection_size": 32}
    whole = randomised(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))
    whole.save_pretrained(tmp_path / "whole")
    held = load_file(tmp_path / "whole" / "model.safetensors")
    assert {"logit_scale", "logit_bias"} < held.keys()
    mine = {name: to_ours(name, "tower") for name in held if name.startswith("vision_model.") and ".head." not in name}
    bare = {ours.removeprefix("tower.vision_model."): held[name] for name, ours in mine.items()}
    assert "post_layernorm.weight" in bare
    # The folder says less than transformers writes, as the hub's do.
    config = {"model_type": "siglip_vision_model", **vision}
    folders = [
        tmp_path / "whole",
        tiny.write_folder(tmp_path / "bare", config, bare),
        tiny.write_folder(tmp_path / "older", config, {f"vision_model.{name}": tensor for name, tensor in bare.items()}),
        tiny.write_folder(tmp_path / "half", {"model_type": "siglip", "vision_config": vision}, held),
    ]
    features = [tiny.load(vision_tower=folder).features(pixels_of(32)) for folder in folders]
    assert all(torch.equal(features[0], other) for other in features[1:])


def test_defaults_are_transformers(tiny):
    for kind in TOWERS.values():
        theirs = {"siglip_vision_model": SiglipVisionConfig, "clip_vision_model": CLIPVisionConfig}[kind.MODEL_TYPE]()
        found = tower_config({"model_type": kind.WHOLE, "vision_config": {"model_type": kind.MODEL_TYPE}}, "here")
        assert {name: getattr(theirs, name) for name in vars(found)} == vars(found)


def test_what_a_preprocessor_says_of_siglip():
    config = OurSiglip(image_size=384, patch_size=14)
    own = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3, "image_mean": [0.5] * 3}
    half = (0.5, 0.5, 0.5)
    assert image_spec(config, {}, "here") == image_spec(config, own, "here") == ImageSpec(384, 729, half, half, crops=False)
    # SigLIP2 on the hub.
    assert image_spec(config, {**own, "resample": 2}, "here") == ImageSpec(384, 729, half, half, crops=False, resample="bilinear")
    for given, pattern in (
        ({"size": {"height": 224, "width": 224}}, r"^here: size .*224.* is not the tower's image_size 384; make them equal"),
        ({"size": {"shortest_edge": 384}}, r"^here: size .*shortest_edge.* is not the tower's image_size 384; "),
        ({"resample": 1}, r"^here: resample 1 of the preprocessor is not supported; write 3 \(bicubic\) or 2"),
    ):
        with pytest.raises(UserError, match=pattern):
            image_spec(config, {**own, **given}, "here")


def test_a_spec_is_read_as_it_was_written_and_that_of_clip_reads_as_ever():
    clip = ImageSpec(336, 576, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert clip.written() == {"size": 336, "patches": 576, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    siglip = ImageSpec(384, 729, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crops=False, resample="bilinear")
    assert siglip.written()["crops"] is False
    for spec in (clip, siglip):
        assert ImageSpec.read(json.loads(json.dumps(spec.written()))) == spec


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"model_type": "siglip2_vision_model"}, r"is a SigLIP2 of any aspect \(NaFlex\).* give a SigLIP2 of a fixed size"),
        ({"model_type": "siglip_vision_model", "num_patches": 256}, r"num_patches 256 without an image_size is a SigLIP2 of any aspect"),
        ({"model_type": "siglip2"}, r"is a SigLIP2 of any aspect"),
        ({"model_type": "siglip_vision_model", "image_size": [224, 224]}, r"image_size is \[224, 224\]; a positive whole number"),
        ({"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 14}, r"patch_size 14 is larger than image_size 8"),
        ({"model_type": "siglip_vision_model", "num_attention_heads": 5}, r"num_attention_heads 5 does not divide hidden_size 768"),
    ],
)
def test_towers_that_are_not_supported_are_refused(config, pattern):
    with pytest.raises(UserError, match=pattern):
        tower_config(config, "here")
