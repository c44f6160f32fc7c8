"""Tokenizers: which model is read, legacy, control tokens, and parts that add up to the whole."""

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, model_file: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    return tmp_path


def test_control_ids_are_those_of_the_model(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.vocab_size) == (1, 2, 0, 420)
    assert tokenizer.literals == {"<s>", "</s>", "<unk>"}
    assert [tokenizer.control(name) for name in ("<s>", "</s>", "<unk>", "<|im_end|>", "a")] == [1, 2, 0, None, None]


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "a</s>b", "<0x0A>", "<image>", "</s", "\n", " </s> "])
def test_text_is_text(tokenizer: Tokenizer, text: str) -> None:
    for continues in (False, True):
        ids = tokenizer.encode(text, continues)
        assert not set(ids) & {0, 1, 2}
        assert tokenizer.decode(ids).strip() == text.strip()


def test_legacy_is_the_space_after_a_control_token(model_file: Path) -> None:
    new, old = (Tokenizer.load(model_file, legacy) for legacy in (False, True))
    assert new.encode("USER") == old.encode("USER") == old.encode("USER", continues=True)
    assert new.encode("USER", continues=True) != new.encode("USER")
    assert [new.piece(i) for i in new.encode(" dog", continues=True)] == ["▁dog"]


@pytest.mark.parametrize(
    ("config", "given", "legacy"), [({}, None, True), ({"legacy": False}, None, False), ({"legacy": False}, True, True)]
)
def test_legacy_comes_from_the_config_unless_given(folder: Path, config: dict, given: bool | None, legacy: bool) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(folder, given).legacy is legacy


def test_the_digest_is_of_content_and_legacy(folder: Path, model_file: Path) -> None:
    first = Tokenizer.load(model_file, False)
    assert Tokenizer.load(folder, False).digest == first.digest
    assert Tokenizer.load(folder, True).digest != first.digest
    (folder / "added_tokens.json").write_text('{"<pad>": 420}')
    padded = Tokenizer.load(folder, False)
    assert padded.digest != first.digest
    assert (padded.vocab_size, padded.control("<pad>")) == (421, 420)


def test_added_tokens_are_read_from_the_config(folder: Path) -> None:
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {"420": {"content": "<|im_end|>", "special": True}},
        "eos_token": {"content": "<|im_end|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(folder)
    assert (loaded.bos_id, loaded.eos_id, loaded.control("</s>")) == (None, 420, 420)
    assert not set(loaded.encode("a <|im_end|>")) & {420}


def test_a_pickled_tokenizer_is_the_same(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert (again.digest, again.encode("a red dog")) == (tokenizer.digest, tokenizer.encode("a red dog"))


WORDS = st.one_of(st.text(max_size=8), st.sampled_from([" ", "  ", "\n", "▁", " red dog", "USER:", "###", "é☃", "<s>", "colour of"]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(WORDS, min_size=1, max_size=6), continues=st.booleans())
def test_parts_give_the_ids_of_the_whole(parts: list[str], continues: bool, tokenizer: Tokenizer, model_file: Path) -> None:
    """sentencepiece itself, on the joined text, is the judge; a text after a control token begins after one more line end."""
    whole = "".join(parts)
    try:
        whole.encode()
    except UnicodeEncodeError:
        return
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids, counts = tokenizer.encode_parts(parts, continues)
    expected = plain.encode("\n" + whole)[len(plain.encode("\n")) :] if continues else plain.encode(whole)
    assert ids == expected
    assert sum(counts) == len(ids)
    assert all(not count for part, count in zip(parts, counts, strict=True) if not part)


def test_a_border_that_a_token_spans_goes_to_the_part_it_starts_in(tokenizer: Tokenizer) -> None:
    assert [tokenizer.piece(i) for i in tokenizer.encode(" dog", True)] == ["▁dog"]
    assert tokenizer.encode_parts([" d", "og two"], True)[1] == [1, 1]
    assert tokenizer.encode_parts([" dog", " two"], True)[1] == [1, 1]


def test_a_unigram_model_is_weighed_as_a_whole(tmp_path: Path) -> None:
    sentences = ["a red dog and two blue cats near the house", "what is the colour of this image", "yes no red dog blue cat"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    loaded = Tokenizer.load(tmp_path, True)
    parts = ["a red", "  dog and\n", "two ﬁne cats", " near"]
    ids, counts = loaded.encode_parts(parts)
    assert ids == plain.encode("".join(parts))
    assert sum(counts) == len(ids)
    assert loaded.decode(ids[: counts[0]]) == "a red"


def metaspace_json(folder: Path, scheme: str) -> Path:
    """A tokenizer.json as Llama's converted one: leading spaces by Metaspace, <s> before a text."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", ":", "<", ">", "/", "s", "▁a", "▁b"]
    model = models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>")  # noqa: S106
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("scheme", "legacy", "after"), [("first", False, ["a"]), ("always", True, ["▁a"])])
def test_a_tokenizer_json_serves_where_there_is_no_model(tmp_path: Path, scheme: str, legacy: bool, after: list[str]) -> None:
    loaded = Tokenizer.load(metaspace_json(tmp_path, scheme))
    assert (loaded.bos_id, loaded.eos_id, loaded.unk_id, loaded.vocab_size, loaded.legacy) == (1, 2, 0, 14, legacy)
    assert [loaded.piece(i) for i in loaded.encode("a b")] == ["▁a", "▁b"]
    assert [loaded.piece(i) for i in loaded.encode("a", continues=True)] == after
    assert loaded.encode_parts(["a", "b:", " b"])[1] == [1, 2, 1]
    assert loaded.encode_parts(["a", "b: ", "b"])[1] == [1, 3, 0]
    assert not set(loaded.encode("a</s>b<s>")) & {1, 2}
    assert pickle.loads(pickle.dumps(loaded)).digest == loaded.digest  # noqa: S301


def test_a_byte_level_tokenizer_json_without_bos(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": None}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.control("<|im_start|>")) == (None, 258, 257)
    assert loaded.encode_parts(["é a", " b"])[1] == [4, 2]
    assert loaded.decode(loaded.encode("é <|im_end|>")) == "é <|im_end|>"
    assert 258 not in loaded.encode("<|im_end|>")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.model", b"no model", "is no sentencepiece model"),
        ("tokenizer.model", b"", "is no sentencepiece model"),
        ("tokenizer.json", b"{}", "is no tokenizer.json"),
        ("other.txt", b"", "holds no tokenizer.model and no tokenizer.json"),
    ],
)
def test_a_broken_tokenizer_is_said_in_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_files_beside_the_model_are_said(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        Tokenizer.load(folder)
    with pytest.raises(UserError, match="no such file or folder"):
        Tokenizer.load(folder / "missing")
