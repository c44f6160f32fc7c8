"""Layout hf of decoders other than Vicuna's, with the other kind of tokenizer; transformers has the last word."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastllava.batch import IMAGE_ID
from fastllava.errors import UserError
from fastllava.model.llava import normalise
from fastllava.model.weights import write_checkpoint
from fastllava.model.weights.tokenizer_json import from_sentencepiece

TEXT = ["USER: what is this? ASSISTANT: a red bus", "def f(x):\n    return x", "naïve café 東京"] * 3
TRAINED = {"image_policy": "square", "max_tokens": 512}


def byte_level_tokenizer(folder):
    """A tokenizer.json as Llama 3's and Qwen's: byte-level BPE, no sentencepiece beside it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}))
    return tokenizer


@pytest.mark.parametrize(
    ("family", "vocab"),
    [("llama", 300), ("mistral", 304), ("qwen2", 320), ("qwen3", 304)],
)
def test_transformers_loads_grouped_tied_decoders_with_a_tokenizer_json(tiny, tmp_path, family, vocab):
    import transformers

    given = {"model_type": family, "vocab_size": vocab, "num_key_value_heads": 2, "tie_word_embeddings": family != "mistral"}
    config = {**tiny.LLM, **given}
    folder = tiny.write_folder(tmp_path / "llm", config, tiny.llm_tensors(config))
    size = byte_level_tokenizer(folder).get_vocab_size()
    model = tiny.load(llm=folder, projector="fresh")
    out = tmp_path / "out"
    write_checkpoint(model, "hf", out, torch.float32, source=tiny.config(llm=folder), **TRAINED)
    written = json.loads((out / "config.json").read_text())
    assert written["image_token_index"] == size
    assert written["text_config"]["vocab_size"] == (vocab if size < vocab else 320)
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == size
    assert processor.tokenizer.pad_token_id == 0
    assert processor.image_processor.do_pad is False
    sample = tiny.mixed()[2]
    ids = [token for i in sample.ids for token in ([size] * tiny.PATCHES if i == IMAGE_ID else [i])]
    pixels = normalise(torch.stack(sample.images), torch.tensor(model.spec.mean), torch.tensor(model.spec.std))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, :, :vocab]
        found = model.logits(tiny.pack([sample]))
        again = tiny.load(llm=out, vision_tower=None).logits(tiny.pack([sample]))
    assert (found - expected).abs().max() < 1e-4
    assert torch.equal(again[:, :vocab], found)
    if family == "qwen2":
        # The image's row is one of the rows that its embedding has to spare: nothing is added to the table.
        assert load_file(out / "model.safetensors")["language_model.model.embed_tokens.weight"].shape == (320, 32)


def train_sentencepiece(folder, **given):
    import io

    import sentencepiece

    options = {
        "vocab_size": 400,
        "character_coverage": 1.0,
        "byte_fallback": True,
        "split_digits": True,
        "hard_vocab_limit": False,
        **given,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, **options)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("legacy", [True, False])
def test_both_kinds_of_sentencepiece_model_are_converted(tmp_path, kind, legacy):
    pieces = train_sentencepiece(
        tmp_path,
        model_type=kind,
        vocab_size=330,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    tokenizer = from_sentencepiece(tmp_path / "tokenizer.model", {}, legacy, add_bos=True)
    assert tokenizer.token_to_id("<image>") == pieces.get_piece_size()
    for text in (*TEXT[:3], "a  b\n\n  c", "ASSISTANT: 3 buses é"):
        assert tokenizer.encode(text).ids == [pieces.bos_id(), *pieces.encode(text)], text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_sentencepiece_model_that_rewrites_text_is_not_written_wrongly(tmp_path):
    train_sentencepiece(tmp_path, model_type="bpe", normalization_rule_name="nmt_nfkc")
    with pytest.raises(
        UserError, match=r"^model\.tokenizer: .* cannot be written as tokenizer\.json, .* differently; write --layout llava"
    ):
        from_sentencepiece(tmp_path / "tokenizer.model", {}, False, add_bos=True)


def test_added_tokens_keep_their_ids_and_a_gap_is_refused(tmp_path):
    pieces = train_sentencepiece(tmp_path, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
    size, file = pieces.get_piece_size(), tmp_path / "tokenizer.model"
    tokenizer = from_sentencepiece(file, {0: "<unk>", size: "<|im_start|>", size + 1: "<|im_end|>"}, False, add_bos=True)
    assert [tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<image>")] == [size, size + 1, size + 2]
    with pytest.raises(UserError, match=rf"the token '<x>' beside .* has the id {size + 1}, which leaves a gap"):
        from_sentencepiece(file, {size + 1: "<x>"}, False, add_bos=True)


@pytest.mark.parametrize("layout", ["llava", "hf"])
def test_code_that_a_checkpoint_names_does_not_travel_on(tiny, tmp_path, layout):
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoModelForCausalLM": "evil.Evil"}}
    config = {**tiny.LLM, "vocab_size": 320, **code}
    llm = tiny.write_folder(tmp_path / "llm", config, tiny.llm_tensors(config))
    clip = tiny.write_folder(tmp_path / "clip", {**tiny.CLIP, **code}, tiny.clip_tensors())
    byte_level_tokenizer(llm)
    settings = json.loads((llm / "tokenizer_config.json").read_text())
    (llm / "tokenizer_config.json").write_text(json.dumps({**settings, **code}))
    (llm / "generation_config.json").write_text(json.dumps(code))
    source, said = tiny.config(llm=llm, vision_tower=clip), []
    model = tiny.load(llm=llm, vision_tower=clip, projector="fresh")
    assert sum("it names code of its own (auto_map), which is not run and not passed on" in note for note in model.origin.notes) == 2
    write_checkpoint(model, layout, tmp_path / "out", torch.float32, source=source, report=said.append, **TRAINED)
    assert not [path for path in (tmp_path / "out").rglob("*.json") if "auto_map" in path.read_text()]
    assert "tokenizer_config.json: left out auto_map, as code of a checkpoint's own is not passed on" in said
