"""Against transformers: logits of LlavaForConditionalGeneration, features of CLIPVisionModel."""

import json

import pytest
import torch

from fastllava.batch import IMAGE_ID
from fastllava.config import ModelConfig
from fastllava.errors import UserError
from fastllava.model.execution import Execution
from fastllava.model.llava import normalise
from fastllava.model.weights import load_llava
from fastllava.model.weights.layouts import to_ours

VARIANTS = {
    "llama": {"model_type": "llama"},
    "llama_grouped_tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama_biased_linear_rope": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "llama3_rope_head_dim": {
        "model_type": "llama",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral_grouped": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2_grouped_tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3_wide_heads": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "qwen3_biased_tied": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
}
IMAGE = 95


def oracle(tiny, variant, folder):
    """A LlavaForConditionalGeneration with random weights, saved in `folder` as the installed transformers saves it."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {**tiny.LLM, **VARIANTS[variant]}
    config = LlavaConfig(
        vision_config=dict(tiny.CLIP),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=tiny.PATCHES,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers starts biases at 0 and norms at 1, which would hide a mistake with them.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_on_a_mixed_packed_batch(tiny, tmp_path, variant):
    theirs = oracle(tiny, variant, tmp_path)
    ours = load_llava(ModelConfig(llm=tmp_path), Execution(tiny.ops, torch.float32), 0)
    samples = tiny.mixed()
    batch = tiny.pack(samples)
    with torch.no_grad():
        logits = ours.logits(batch)
    mean, std = torch.tensor(ours.spec.mean), torch.tensor(ours.spec.std)
    assert logits.shape == (len(batch.token_ids), tiny.LLM["vocab_size"])
    assert logits.dtype == torch.float32
    for sample, rows in zip(samples, logits.split(batch.cu_seqlens.diff().tolist()), strict=True):
        ids = [token for i in sample.ids for token in ([IMAGE] * tiny.PATCHES if i == IMAGE_ID else [i])]
        pixels = normalise(torch.stack(sample.images), mean, std) if sample.images else None
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
        assert (rows - expected).abs().max() < 1e-4
        assert expected.abs().max() > 0.1


def test_loss_equals_transformers(tiny, tmp_path):
    theirs = oracle(tiny, "llama_grouped_tied", tmp_path)
    ours = load_llava(ModelConfig(llm=tmp_path), Execution(tiny.ops, torch.float32), 0)
    sample = tiny.mixed()[2]
    ids, labels = [], []
    for index, token in enumerate(sample.ids):
        ids += [IMAGE] * tiny.PATCHES if token == IMAGE_ID else [token]
        labels += [-100] * tiny.PATCHES if token == IMAGE_ID else [token if index in sample.supervised else -100]
    pixels = normalise(sample.images[0][None], torch.tensor(ours.spec.mean), torch.tensor(ours.spec.std))
    expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels, labels=torch.tensor([labels])).loss
    found = ours(tiny.pack([sample], weight=1 / len(sample.supervised)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["llama", "qwen2_grouped_tied", "qwen3_wide_heads"])
def test_packed_gradients_equal_those_of_a_padded_batch_in_transformers(tiny, tmp_path, variant):
    theirs = oracle(tiny, variant, tmp_path)
    ours = load_llava(ModelConfig(llm=tmp_path), Execution(tiny.ops, torch.float32), 0)
    samples = tiny.mixed()
    rows, labels = [], []
    for sample in samples:
        rows.append([token for i in sample.ids for token in ([IMAGE] * tiny.PATCHES if i == IMAGE_ID else [i])])
        marked = [(i if n in sample.supervised else -100, i) for n, i in enumerate(sample.ids)]
        labels.append([label for mark, i in marked for label in ([-100] * tiny.PATCHES if i == IMAGE_ID else [mark])])
    longest = max(map(len, rows))
    assert min(map(len, rows)) < longest, "something is padded"
    mean, std = torch.tensor(ours.spec.mean), torch.tensor(ours.spec.std)
    pixels = normalise(torch.stack([image for sample in samples for image in sample.images]), mean, std)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])[:, 1:]
    logits = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    expected.backward()

    found = ours(tiny.pack(samples, weight=1 / int((targets != -100).sum())))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if not name.startswith("tower.")}
    compared = set()
    for name, parameter in theirs.named_parameters():
        ours_name = to_ours(name, "hf")
        if ours_name in gradients:
            difference = (gradients[ours_name] - parameter.grad).norm()
            assert difference <= 1e-5 * parameter.grad.norm() + 1e-9, ours_name
            compared.add(ours_name)
    assert compared == gradients.keys()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("select_layer", [-1, -2, -4, 0, 2])
def test_features_are_the_hidden_states_of_clip_without_the_class_row(tiny, tmp_path, act, select_layer):
    from transformers import CLIPVisionModel

    folder = tiny.write_folder(tmp_path, {**tiny.CLIP, "hidden_act": act}, tiny.clip_tensors())
    model = tiny.load(vision_tower=folder, select_layer=select_layer)
    pixels = torch.stack([sample.images[0] for sample in tiny.mixed() if sample.images])
    normalised = normalise(pixels, torch.tensor(model.spec.mean), torch.tensor(model.spec.std))
    states = CLIPVisionModel.from_pretrained(folder).eval()(normalised, output_hidden_states=True).hidden_states
    torch.testing.assert_close(model.features(pixels), states[select_layer][:, 1:], rtol=1e-5, atol=1e-5)


def test_only_the_blocks_that_select_layer_needs_run(tiny):
    model = tiny.load(select_layer=-2)
    ran = []
    for index, block in enumerate(model.tower.vision_model.encoder.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.features(tiny.mixed()[0].images[0][None])
    assert ran == [0, 1]


@pytest.mark.parametrize("select_layer", [-5, 4])
def test_a_layer_that_the_tower_lacks_is_refused(tiny, select_layer):
    with pytest.raises(UserError, match=rf"^model\.select_layer: {select_layer}, but this tower has hidden states -4 to 3"):
        tiny.load(select_layer=select_layer)


def test_every_spelling_of_a_clip_folder_gives_the_same_tower(tiny, tmp_path):
    tensors = tiny.clip_tensors()
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    whole = {
        **tensors,
        "vision_model.embeddings.position_ids": torch.arange(10)[None],
        "text_model.final_layer_norm.weight": torch.ones(4),
        "text_projection.weight": torch.ones(4, 4),
        "visual_projection.weight": torch.ones(4, 4),
        "logit_scale": torch.tensor(1.0),
    }
    vision = {name: value for name, value in tiny.CLIP.items() if name != "model_type"}
    folders = [
        tiny.clip,
        tiny.write_folder(tmp_path / "bare", tiny.CLIP, bare),
        tiny.write_folder(tmp_path / "whole", {"model_type": "clip", "vision_config": vision, "text_config": {}}, whole),
        tiny.write_folder(tmp_path / "older", {"model_type": "clip", "vision_config_dict": vision}, whole),
    ]
    picture = tiny.mixed()[0].images[0][None]
    features = [tiny.load(vision_tower=folder).features(picture) for folder in folders]
    assert all(torch.equal(features[0], other) for other in features[1:])


def test_pixels_are_normalised_as_the_original_does(each_golden, golden_pixels):
    import numpy as np
    from PIL import Image

    mean, std = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
    checked = 0
    for key, pixels in golden_pixels.items():
        size, policy, file = key.split("/", 2)
        picture = Image.open(each_golden / "pixels" / "images" / file).convert("RGB")
        if policy != "pad":
            continue
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in mean.tolist()))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        resized = np.asarray(square.resize((int(size), int(size)), Image.Resampling.BICUBIC))
        found = normalise(torch.from_numpy(resized.copy()).permute(2, 0, 1)[None], mean, std)[0]
        assert torch.equal(found, torch.from_numpy(pixels)), key
        checked += 1
    assert checked > 5


def test_a_sample_beyond_the_attention_window_is_refused(tiny, tmp_path):
    config = {**tiny.LLM, "model_type": "mistral", "sliding_window": 14}
    model = tiny.load(llm=tiny.write_folder(tmp_path, config, tiny.llm_tensors(config)))
    short, long = tiny.mixed()[1], tiny.mixed()[0]
    assert torch.isfinite(model(tiny.pack([short])))
    with pytest.raises(
        UserError, match=r"^data\.max_tokens: a sample of 15 rows is longer than .* window of 14; write data\.max_tokens=14"
    ):
        model(tiny.pack([long]))


def test_rope_parameters_of_transformers_5_are_read(tiny, tmp_path):
    config = {**tiny.LLM, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    folder = tiny.write_folder(tmp_path, config, tiny.llm_tensors(config))
    frequencies = tiny.load(llm=folder).llm.config.inverse_frequencies()
    torch.testing.assert_close(frequencies, 500.0 ** (-torch.arange(0, 8, 2) / 8) / 2)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == 500.0
