"""Tokens that are added to a vocabulary: words of a text where they are not special, in both kinds of tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError

WORDS = {"<loc_1>": 420, "<loc_12>": 421, "正方形": 422, "wolf": 423, "<|mark|>": 424}
TEXTS = [
    "<loc_1>",
    "<loc_12><loc_1>",
    "a <loc_1>x 正方形 <loc_1> ",
    "正方形\n a",
    "hot wolf",
    "wolf wolfs werewolf",
    "",
    " ",
    "no word",
    "a <loc_1",
    "wolf ",
]


def write(folder: Path, model_file: Path, flags: dict[str, Any], legacy: bool) -> Path:
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    decoder = {str(i): {"content": text, "special": text == "<|mark|>", **flags} for text, i in WORDS.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "legacy": legacy}))
    return folder


def slow(model_file: Path, flags: dict[str, Any], legacy: bool) -> Any:
    """The tokenizer class in Python over sentencepiece, with the same added tokens."""
    backend = pytest.importorskip("transformers.tokenization_utils_sentencepiece").SentencePieceBackend
    from transformers import AddedToken

    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    built = backend(vocab_file=str(model_file), legacy=legacy, **named)
    for text in WORDS:
        built.add_tokens([AddedToken(text, special=text == "<|mark|>", normalized=False, **flags)], special_tokens=text == "<|mark|>")
    assert {text: built.convert_tokens_to_ids(text) for text in WORDS} == WORDS
    return built


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_text_becomes_them_as_in_transformers(flags: dict[str, Any], model_file: Path, tmp_path: Path) -> None:
    """The legacy form, which transformers still has; the other differs in the space after a token alone."""
    loaded, theirs = Tokenizer.load(write(tmp_path, model_file, flags, True)), slow(model_file, flags, True)
    for text in TEXTS:
        assert loaded.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_without_legacy_the_text_after_one_has_no_leading_space(model_file: Path, tmp_path: Path) -> None:
    """The space that a text begins with comes first, even before an added token, as in LlamaTokenizer of transformers 4.37.2."""
    loaded = Tokenizer.load(write(tmp_path, model_file, {}, False))
    pieces = [loaded.piece(i) for i in loaded.encode("<loc_1>red 正方形 red")]
    assert pieces[:2] == ["▁", "<loc_1>"]
    assert "".join(pieces[2:]) == "red▁正方形▁red"
    assert loaded.encode("<loc_1>", continues=True) == [420]
    assert loaded.encode("a <|mark|>") == Tokenizer.load(model_file, False).encode("a <|mark|>")
    assert loaded.literals == {"<s>", "</s>", "<unk>", "<|mark|>"}


@pytest.mark.parametrize("legacy", [True, False])
def test_parts_give_the_ids_of_the_whole(legacy: bool, model_file: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(write(tmp_path, model_file, {}, legacy))
    text = "a red <loc_1>x 正方形 wolf\n<loc_12> end"
    whole = loaded.encode(text)
    for at in range(len(text) + 1):
        ids, counts = loaded.encode_parts([text[:at], text[at:]])
        assert ids == whole
        assert sum(counts) == len(whole)
    assert loaded.encode_parts(["a <lo", "c_1>", "", " b"], True)[1][1:3] == [0, 0]
    assert loaded.decode(loaded.encode("<loc_1>red 正方形 red")).strip() == "<loc_1>red 正方形 red"


def test_a_tokenizer_json_agrees(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_tokens(["<loc_1>"])
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("<loc_1>") == [256]
    assert 257 not in loaded.encode("</s>")
    assert loaded.decode([256, 257]) == "<loc_1>"
    assert loaded.literals == {"</s>"}


def test_tokens_without_flags_are_words_unless_they_are_named(model_file: Path, tmp_path: Path) -> None:
    """added_tokens.json alone, as older models have it."""
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 420, "<loc_1>": 421, "<extra>": 422}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "additional_special_tokens": [{"content": "<extra>"}]}')
    loaded = Tokenizer.load(tmp_path, False)
    assert loaded.literals == {"<s>", "</s>", "<unk>", "<pad>", "<extra>"}
    assert 421 in loaded.encode("<loc_1>")
    assert not {420, 422} & set(loaded.encode("<pad><extra>"))


BROKEN = {
    "an id that is text": ("added_tokens.json", '{"<x>": "abc"}', "the id of token '<x>' is 'abc'"),
    "an id below 0": ("added_tokens.json", '{"<x>": -5}', "the id of token '<x>' is '-5'"),
    "an id that is no whole number": ("added_tokens.json", '{"<x>": 1.5}', "is '1.5'; write a whole number"),
    "an id that is true": ("added_tokens.json", '{"<x>": true}', "is 'True'"),
    "an id beyond any vocabulary": ("added_tokens.json", '{"<x>": 99999999999}', "is '99999999999'"),
    "a list": ("added_tokens.json", "[1]", "holds a list where an object is expected"),
    "a key that is no id": ("tokenizer_config.json", '{"added_tokens_decoder": {"abc": {"content": "<x>"}}}', "is 'abc'"),
    "a decoder that is a list": ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is no object"),
    "deep JSON": ("tokenizer_config.json", "[" * 200_000 + "]" * 200_000, "nested too deep"),
    "deep JSON in a map": ("special_tokens_map.json", '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line(name: str, model_file: Path, tmp_path: Path) -> None:
    file, content, says = BROKEN[name]
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def split_by(folder: Path, pattern: str) -> Path:
    model = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abc ")}, merges=[], unk_token="a"))  # noqa: S106
    model.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    model.add_special_tokens(["</s>"])
    model.save(str(folder / "tokenizer.json"))
    return folder


def test_an_expression_that_explodes_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"tokenizer\.json: a regular expression of its pre_tokenizer .* breaks off.*; give the tokenizer"
    ) as error:
        Tokenizer.load(split_by(tmp_path, r"(\w+\s?)+(\w+\s?)+(\w+\s?)+$^"))
    assert "\n" not in str(error.value)


def test_an_expression_that_is_slow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllava.data.patterns._SECONDS", 1.0)
    with pytest.raises(UserError, match=r"takes longer than 1 s"):
        Tokenizer.load(split_by(tmp_path, r"(a|a?a){1,11}$^"))


def test_plain_expressions_are_taken(tmp_path: Path) -> None:
    assert Tokenizer.load(split_by(tmp_path, r"\s+|[a-c]+")).encode("abc a") == [0, 1, 2, 3, 0]


def test_a_text_that_breaks_the_tokenizer_is_a_bad_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from fastllava.data.checks import BadRecord

    loaded = Tokenizer.load(split_by(tmp_path, r"x(q+q+)+z"))
    with pytest.raises(BadRecord) as problem:
        loaded.encode("x" + "q" * 40)
    assert problem.value.reason == "tokenizer_failed"
    capfd.readouterr()
