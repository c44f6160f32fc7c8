"""A template and a tokenizer that do not fit are refused before any record is read, with the templates that do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from fastllava.batch import IMAGE_ID, ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import Record
from fastllava.data.conversation import TEMPLATES, encode_record, template
from fastllava.data.inspect import inspect_records, render_text
from fastllava.data.marks import check_marks
from fastllava.data.prepared import prepare
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError

MakeData = Callable[..., DataConfig]
CHATML = {"mpt", "chatml_direct", "mistral_direct", "qwen_2_5", "llava_next_qwen"}
NEWER = {"qwen_3", "llama_3", "phi_3", "gemma", "llava_next_llama_3", "llava_next_gemma"}
TEXT = {"plain", "v0_plain", "default", "v0", "llava_v0", "v0_mmtag"}


def byte_level(folder: Path, special: list[str], config: dict[str, Any] | None, bos: str | None = None) -> Path:
    """A tokenizer.json as those of Llama 3 and Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(special)
    if bos:
        model.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, model.token_to_id(bos))])
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
# A tokenizer.json, and the templates that fit it beside those whose marks are text.
FITTING: dict[str, tuple[list[str], dict[str, Any] | None, str | None, set[str]]] = {
    "Qwen": (QWEN, {"eos_token": "<|im_end|>", "bos_token": None}, None, set(TEMPLATES) - NEWER - {"llama_2", "llava_llama_2"}),
    "Llama 3": (LLAMA_3, {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}, LLAMA_3[0], set(TEMPLATES) - NEWER - CHATML),
    "no EOS is known": (LLAMA_3, None, LLAMA_3[0], TEXT),
    "no token at all": ([], None, None, TEXT),
    "Qwen without a config": (QWEN, None, None, set(TEMPLATES) - NEWER - {"llama_2", "llava_llama_2"}),
}


@pytest.mark.parametrize("name", FITTING)
def test_which_templates_fit_a_tokenizer_json(name: str, tmp_path: Path) -> None:
    special, config, bos, fitting = FITTING[name]
    loaded = Tokenizer.load(byte_level(tmp_path, special, config, bos))
    record = Record("r", ("a.png",), [("human", "<image>\nWhat?"), ("gpt", "A dog.")])
    for form in TEMPLATES.values():
        if form.name not in fitting | TEXT:
            with pytest.raises(
                UserError, match=f"data.template: '{form.name}' writes .*tokenizer.json has no token for.* write one that fits"
            ):
                check_marks(form, loaded)
            continue
        check_marks(form, loaded)
        encoded = encode_record(record, form, loaded, 4096)
        if form.style in ("v1", "llama_2", "mpt"):
            # The answer ends in one token, which is the last.
            end = loaded.eos_id if form.style != "mpt" else loaded.control("<|im_end|>")
            assert encoded.ids[-1] == end
            assert encoded.supervised[-1][1] == len(encoded.ids)


def test_llama_refuses_chatml_and_says_what_fits(tokenizer: Tokenizer, chatml: Tokenizer) -> None:
    with pytest.raises(UserError) as error:
        check_marks(template("mpt"), tokenizer)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith("data.template: 'mpt' writes <|im_start|> and <|im_end|>, which ")
    fitting = said.split("write one that fits (")[1].split(")")[0].split(", ")
    assert set(fitting) == set(TEMPLATES) - NEWER - CHATML
    for form in TEMPLATES.values():
        if form.name not in NEWER:
            check_marks(form, chatml)


def test_refused_before_any_record_is_read(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    data = make_data(b"no records at all", template="mpt")
    for use in (
        lambda: prepare(data, tokenizer, spec, lambda _: None),
        lambda: next(inspect_records(data.records, tokenizer, "mpt")),
        lambda: next(render_text(data.records, tokenizer, "mpt")),
    ):
        with pytest.raises(UserError, match=r"data\.template: 'mpt' writes"):
            use()


def test_an_end_token_that_is_named_and_missing_is_said(tmp_path: Path, model_file: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    with pytest.raises(UserError, match=r"tokenizer\.model: has no token '<\|eot\|>', which the files beside it name as eos_token"):
        Tokenizer.load(tmp_path)


def test_the_begin_mark_is_a_token_where_texts_do_not_begin_with_it(tmp_path: Path, model_file: Path) -> None:
    """llama_2 writes <s> between rounds, whether or not a text begins with it."""
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    loaded = Tokenizer.load(tmp_path, False)
    record = Record("r", (), [("human", "What?"), ("gpt", "A dog."), ("human", "What?"), ("gpt", "A cat.")])
    assert loaded.bos_id is None
    assert encode_record(record, template("llama_2"), loaded, 4096).ids.count(1) == 1


def test_a_control_token_named_as_unknown_refuses_nothing(tmp_path: Path) -> None:
    """GPT-2 names one so, and its vocabulary has pieces for every text."""
    config = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    loaded = Tokenizer.load(byte_level(tmp_path, ["<|endoftext|>"], config))
    record = Record("r", (), [("human", "What?"), ("gpt", "A dog.")])
    assert loaded.unk_id is None
    assert encode_record(record, template("v1"), loaded, 4096).ids[-1] == loaded.eos_id


def test_the_image_of_a_whole_llava_is_no_forbidden_text(tmp_path: Path, model_file: Path, make_data: MakeData) -> None:
    """Its tokenizer has <image> as a control token; text that shows no picture may not spell it."""
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    added = {"420": {"content": "<image>", "special": True}, "421": {"content": "<pad>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "legacy": False}))
    from_sentencepiece, plain = Tokenizer.load(tmp_path), Tokenizer.load(model_file, False)
    from_json = Tokenizer.load(byte_level(tmp_path / "json", ["<s>", "</s>", "<image>"], {"eos_token": "</s>"}))
    shown = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]}
    told = {"id": 2, "conversations": [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "A tag."}]}
    records = make_data([shown, told]).records
    for loaded in (from_sentencepiece, from_json):
        first, second = inspect_records(records, loaded, "v1")
        assert first["input_ids"].count(IMAGE_ID) == 1
        assert second["quarantined"] == "control_literal"
    assert next(inspect_records(records, from_sentencepiece, "v1")) == next(inspect_records(records, plain, "v1"))
    assert (from_sentencepiece.vocab_size, from_sentencepiece.text_size) == (422, 420)
    assert (from_json.vocab_size, from_json.text_size) == (259, 256)


def test_ids_may_leave_holes(tmp_path: Path) -> None:
    folder = byte_level(tmp_path, ["</s>"], {"eos_token": "</s>"})
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["far"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    loaded = Tokenizer.load(folder)
    assert (loaded.vocab_size, loaded.text_size) == (5001, 5001)
