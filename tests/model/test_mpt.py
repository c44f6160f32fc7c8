"""MPT: transformers' logits, loss and gradients, packed and padded; what is computed again; what is read, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastllava.errors import UserError
from fastllava.model import hf_reference
from fastllava.model.build import rebuilt
from fastllava.model.compiled import GRAPHS
from fastllava.model.decoders import build_decoder
from fastllava.model.execution import Execution
from fastllava.model.layers import set_parameter
from fastllava.model.mpt import Mpt, MptConfig
from fastllava.model.ops import Ops, choose_ops
from fastllava.model.weights import load_llava, read_origin, write_checkpoint
from fastllava.model.weights.configs import decoder_config

CPU = torch.device("cpu")
MPT = {"model_type": "mpt", "vocab_size": 96, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}
VARIANTS = {
    "heads of a power of 2": {"n_heads": 4},
    "other heads": {},
    "one head": {"n_heads": 1},
    "clipped": {"attn_config": {"clip_qkv": 0.5}},
    "scaled": {"n_heads": 3, "attn_config": {"softmax_scale": 0.5}},
    "a head of its own": {"tie_word_embeddings": False},
}


def theirs_of(variant):
    """transformers' MptForCausalLM of random weights that are large enough for all parts to matter."""
    from transformers import MptConfig as Theirs
    from transformers import MptForCausalLM

    torch.manual_seed(0)
    model = MptForCausalLM(Theirs(**{**MPT, **VARIANTS[variant]}, initializer_range=0.2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ours_of(tiny, model, folder, dtype=torch.float32, **execution):
    """The LLaVA whose decoder transformers has written, with a projector drawn anew."""
    model.save_pretrained(folder)
    llava = load_llava(tiny.config(llm=folder, projector="fresh"), Execution(tiny.ops, dtype, **execution), 5)
    llava.tower.requires_grad_(False)
    return llava


def padded(model, llava, batch, left=False):
    """transformers' logits of the samples of `batch` in one padded batch of embeddings, put together again: [T, V]."""
    lengths = batch.cu_seqlens.diff().tolist()
    rows = llava._spliced(batch).split(lengths)
    longest = max(lengths)
    pad = lambda row: (longest - len(row), 0) if left else (0, longest - len(row))  # noqa: E731
    embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, *pad(row))) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones(len(row), dtype=torch.int64), pad(row)) for row in rows])
    return model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[mask.bool()]


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["heads4", "heads6", "heads6_clip"])
def test_recorded_logits_loss_and_gradients(tiny, larger, name):
    recorded = load_file(larger / "mix" / "mpt" / f"{name}.safetensors")
    config = json.loads((larger / "mix" / "mpt" / f"{name}.json").read_text())
    model = build_decoder(decoder_config(config, name), tiny.ops)
    for parameter in dict(model.named_parameters()):
        set_parameter(model, parameter, torch.nn.Parameter(recorded[f"weights.{parameter}"]))
    ids, labels = recorded["input_ids"][0], recorded["labels"][0]
    rows = len(ids)
    bounds = torch.tensor([0, rows], dtype=torch.int32)
    hidden = model(torch.nn.functional.embedding(ids, model.embedding_weight), torch.arange(rows), bounds, rows)
    logits = hidden @ model.head_weight.T
    assert (logits - recorded["logits"][0]).abs().max() < 1e-5
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:])
    torch.testing.assert_close(loss, recorded["loss"].squeeze(), rtol=1e-5, atol=0)
    loss.backward()
    for parameter, weight in model.named_parameters():
        expected = recorded[f"grad.{parameter}"]
        assert weight.grad is not None
        assert (weight.grad - expected).norm() <= 1e-5 * expected.norm(), parameter


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("variant", [pytest.param(name, id=name.replace(" ", "-")) for name in VARIANTS])
def test_logits_loss_and_gradients_of_packed_samples_equal_transformers_padded_batch(tiny, tmp_path, variant, left):
    theirs = theirs_of(variant)
    ours = ours_of(tiny, theirs, tmp_path)
    batch = tiny.pack(tiny.mixed(), weight=0.1)
    with torch.no_grad():
        found = ours.logits(batch)
    logits = padded(theirs, ours, batch, left)
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()
    loss = 0.1 * torch.nn.functional.cross_entropy(logits[batch.supervised_rows.long()], batch.targets, reduction="sum")
    ours.zero_grad(set_to_none=True)
    loss.backward()
    expected = {f"llm.{name}": p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    # The embedding gets a share through what was spliced, which is ours.
    of_splice = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    found_loss, gradients = loss_and_gradients(ours, batch)
    torch.testing.assert_close(found_loss, loss.detach(), rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        sought = sum(found[name] for found in (expected, of_splice) if name in found)
        assert (gradient - sought).norm() <= 2e-5 * sought.norm(), name
    assert gradients.keys() == expected.keys() | of_splice.keys()


def test_a_sample_is_the_same_wherever_it_lies(tiny, tmp_path):
    """Its biases go by its own rows: samples one at a time add up to the packed batch."""
    ours = ours_of(tiny, theirs_of("clipped"), tmp_path, torch.float64)
    samples = tiny.mixed()
    loss, gradients = loss_and_gradients(ours, tiny.pack(samples, weight=0.1))
    parts = [loss_and_gradients(ours, tiny.pack([sample], weight=0.1)) for sample in samples]
    torch.testing.assert_close(loss, torch.stack([part for part, _ in parts]).sum(), rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        summed = torch.stack([part[name] for _, part in parts if name in part]).sum(0)
        assert (gradient - summed).norm() <= 1e-11 * gradient.norm(), name


@pytest.mark.parametrize("frozen", [True, False])
def test_the_last_layer_of_supervised_rows_and_what_is_computed_again(tiny, tmp_path, frozen):
    execution = {"last_layer": "all"}
    ours = ours_of(tiny, theirs_of("clipped"), tmp_path, torch.float64, **execution)
    ours.llm.requires_grad_(not frozen)
    for group in ([0, 1, 2, 3], [5]):
        batch = tiny.pack([tiny.mixed()[i] for i in group], weight=0.1)
        expected = loss_and_gradients(ours, batch)
        supervised = rebuilt(ours, replace(ours.execution, last_layer="supervised"))
        fewer = loss_and_gradients(supervised, batch)
        torch.testing.assert_close(fewer[0], expected[0], rtol=1e-12, atol=0)
        assert all((fewer[1][name] - g).norm() <= 1e-11 * g.norm() for name, g in expected[1].items())
        for model, sought in ((ours, expected), (supervised, fewer)):
            for recompute in ("norms", "selective", "full"):
                again = loss_and_gradients(rebuilt(model, replace(model.execution, recompute=recompute)), batch)
                assert torch.equal(again[0], sought[0])
                assert all(torch.equal(again[1][name], gradient) for name, gradient in sought[1].items()), recompute


class Products(TorchDispatchMode):
    """Counts matrix products and runs of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.attention += func is torch.ops.fastllava.attention_varlen.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "products", "attention"), [("none", 0, 0), ("norms", 0, 0), ("selective", 2, 0), ("full", 7, 2)])
def test_products_computed_again(recompute, products, attention):
    """Two layers: Wqkv, out_proj and up_proj, in the last one queries apart; down_proj never."""
    ops = Ops(choose_ops({}, CPU, torch.float32).chosen | {"attention": "varlen"})
    model = Mpt(MptConfig.read(MPT, "test"), ops)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, rows = torch.randn(20, 48, requires_grad=True), torch.tensor([3, 4, 19])
    bounds = torch.tensor([0, 5, 20], dtype=torch.int32)
    out = model(x, torch.cat((torch.arange(5), torch.arange(15))), bounds, 15, recompute, rows)
    with Products() as backward:
        out.sum().backward()
    # A gradient of the input and one of the weight for each of the forward's 4 + 5.
    assert backward.products == 2 * 9 + products
    assert backward.attention == attention


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["layer", "step"])
def test_few_graphs_give_the_eager_gradients(tiny, tmp_path, mode):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    eager = ours_of(tiny, theirs_of("clipped"), tmp_path)
    execution = Execution(choose_ops({}, CPU, torch.float32, compiled=True), torch.float32, compile=mode, backend=graphs)
    compiled = rebuilt(eager, execution)
    for group in ([2, 3], [0, 2], [5], [1], [0, 1, 3]):
        batch = tiny.pack([tiny.mixed()[i] for i in group], weight=0.1)
        expected, found = loss_and_gradients(eager, batch), loss_and_gradients(compiled, batch)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
        assert all((found[1][name] - g).norm() <= 1e-5 * g.norm() for name, g in expected[1].items())
    assert 1 <= graphs.frame_count <= GRAPHS[mode]


def test_cached_answers_of_a_batch_are_the_most_likely_tokens_of_whole_forwards(tiny, tmp_path):
    """What `fastllava answer` runs, beyond the rows that config.json says."""
    ours = ours_of(tiny, theirs_of("clipped"), tmp_path)
    decoder = hf_reference.decoder(ours, dict(ours.named_parameters()).__getitem__, torch.float32).eval()
    prompts = [[1, 5, 6], [1, 7, 8, 9, 10, 11, 12], [1, *range(10, 80)]]
    longest = max(map(len, prompts))
    embeds = torch.stack(
        [torch.nn.functional.pad(ours.llm.embedding_weight[torch.tensor(ids)].detach(), (0, 0, longest - len(ids), 0)) for ids in prompts]
    )
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    answers = decoder.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    for ids, answer in zip(prompts, answers.tolist(), strict=True):
        for token in answer:
            with torch.no_grad():
                assert ours.logits(tiny.pack([tiny.Sample(ids)]))[-1].argmax() == token
            ids.append(token)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_files_are_read_in_the_names_that_are_about(tiny, tmp_path, layout):
    """With the head that is the embedding, too, and the sizes under the names of transformers' other models."""
    theirs = theirs_of("clipped")
    expected = {f"llm.{name}": tensor for name, tensor in theirs.state_dict().items() if not name.startswith("lm_head")}
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 96}
    config = {"model_type": "mpt", **sizes, "attn_config": {"clip_qkv": 0.5, "attn_impl": "torch", "attn_pdrop": 0.0, "qk_ln": False}}
    folder = tiny.write_folder(tmp_path, config, {name: tensor.clone() for name, tensor in theirs.state_dict().items()})
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    model = load_llava(tiny.config(llm=folder, projector="fresh"), Execution(tiny.ops, torch.float32), 0)
    found = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("llm.")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert model.llm.config == replace(MptConfig.read(MPT, "test"), clip_qkv=0.5)


def test_whole_checkpoints_of_the_original_lie_under_transformer(tiny, tmp_path):
    """Written and read so, and read in the one-layer form of the first of them; Hugging Face's layout has none."""
    source = tiny.config(llm=tmp_path / "llm", projector="fresh")
    ours = ours_of(tiny, theirs_of("clipped"), tmp_path / "llm")
    written = {"source": source, "image_policy": "pad", "max_tokens": 100}
    write_checkpoint(ours, "llava", tmp_path / "out", torch.float32, **written)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {"transformer.mm_projector.0.weight", "transformer.blocks.1.attn.Wqkv.weight", "transformer.wte.weight"} <= tensors.keys()
    assert all(name.startswith("transformer.") for name in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["max_seq_len"]) == ("llava_mpt", ["LlavaMptForCausalLM"], 100)
    again = load_llava(tiny.config(llm=tmp_path / "out"), Execution(tiny.ops, torch.float32), 0)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())

    first = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name and "vision_tower" not in name}
    first |= {"transformer.mm_projector.weight": torch.ones(48, 16), "transformer.mm_projector.bias": torch.ones(48)}
    said = {**MPT, "model_type": "llava_mpt", "attn_config": {"clip_qkv": 0.5}, "mm_vision_tower": "clip", "mm_vision_select_layer": -2}
    folder = tiny.write_folder(tmp_path / "first", said, first)
    early = load_llava(tiny.config(llm=folder, projector_type="linear"), Execution(tiny.ops, torch.float32), 0)
    assert torch.equal(dict(early.projector.named_parameters())["weight"], torch.ones(48, 16))
    tiny.write_folder(tmp_path / "first", {**said, "mm_use_im_start_end": True}, first)
    with pytest.raises(UserError, match="tokens around its images"):
        read_origin(tiny.config(llm=folder, projector_type="linear"))

    with pytest.raises(UserError, match=r"^--layout: hf holds no MPT, .*; write --layout llava$"):
        write_checkpoint(ours, "hf", tmp_path / "hf", torch.float32, **written)
    whole = {"model_type": "llava", "text_config": MPT, "vision_config": tiny.CLIP}
    with pytest.raises(UserError, match=r"^model\.llm: .*/config\.json: text_config is an MPT's"):
        read_origin(tiny.config(llm=tiny.write_folder(tmp_path / "whole", whole, {})))


REFUSED = {
    "attn_config.alibi false": {"attn_config": {"alibi": False}},
    "attn_config.alibi_bias_max 16": {"attn_config": {"alibi_bias_max": 16}},
    'attn_config.attn_type "multiquery_attention"': {"attn_config": {"attn_type": "multiquery_attention"}},
    "attn_config.attn_pdrop 0.1": {"attn_config": {"attn_pdrop": 0.1}},
    "attn_config.qk_ln true": {"attn_config": {"qk_ln": True}},
    "attn_config.prefix_lm true": {"attn_config": {"prefix_lm": True}},
    "attn_config.attn_uses_sequence_id true": {"attn_config": {"attn_uses_sequence_id": True}},
    "attn_config.rope true": {"attn_config": {"rope": True}},
    "attn_config.kv_n_heads 2": {"attn_config": {"kv_n_heads": 2}},
    'attn_config is "torch"': {"attn_config": "torch"},
    "attn_config: clip_qkv is -1": {"attn_config": {"clip_qkv": -1}},
    "attn_config: softmax_scale is 0": {"attn_config": {"softmax_scale": 0}},
    "expansion_ratio 2": {"expansion_ratio": 2},
    "no_bias false": {"no_bias": False},
    'logit_scale "inv_sqrt_d_model"': {"logit_scale": "inv_sqrt_d_model"},
    "resid_pdrop 0.1": {"resid_pdrop": 0.1},
    "emb_pdrop 0.1": {"emb_pdrop": 0.1},
    "embedding_fraction 0.5": {"embedding_fraction": 0.5},
    'norm_type "rmsnorm"': {"norm_type": "rmsnorm"},
    'ffn_config.ffn_type "mptglu"': {"ffn_config": {"ffn_type": "mptglu"}},
    "n_heads 5 does not divide d_model 48": {"n_heads": 5},
    "n_layers is 0": {"n_layers": 0},
    "its weights are quantised": {"quantization_config": {"bits": 4}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_supported_is_refused_by_its_key(tiny, tmp_path, said):
    folder = tiny.write_folder(tmp_path, {**MPT, **REFUSED[said]}, {})
    with pytest.raises(UserError, match=rf"^model\.llm: [^:]*/config\.json: {re.escape(said)}") as error:
        read_origin(tiny.config(llm=folder))
    assert "\n" not in str(error.value)


def test_what_is_said_is_read_back_and_is_what_transformers_takes(tiny, tmp_path):
    from transformers import AutoConfig

    given = {**MPT, "attn_config": {"clip_qkv": 6, "softmax_scale": 1, "attn_pdrop": 0.0, "alibi": True}, "resid_pdrop": 0.0}
    config = MptConfig.read(given, "test")
    fields = config.fields(given)
    assert MptConfig.read(fields, "test") == config
    theirs = AutoConfig.for_model(**fields)
    assert (theirs.attn_config.clip_qkv, theirs.attn_config.softmax_scale, theirs.d_model) == (6.0, 1.0, 48)


def test_flash_attention_is_asked_for_the_columns_too(tiny, tmp_path):
    """A head of 8 columns is 16 wide to attention; one of 252 is too wide for FlashAttention, and a run is told so."""
    from fastllava_kernels.attention.availability import needs_width_of_flash

    folder = tiny.write_folder(tmp_path, MPT, {})
    assert read_origin(tiny.config(llm=folder)).sizes.head_widths["model.llm"] == 16
    wide = tiny.write_folder(tmp_path / "wide", {**MPT, "d_model": 256, "n_heads": 1}, {})
    reason = needs_width_of_flash(read_origin(tiny.config(llm=wide)).sizes)
    assert reason is not None
    assert "those of model.llm are 264 wide" in reason
