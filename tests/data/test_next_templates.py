"""LLaVA-NeXT's templates: ids and supervised tokens are those that its preprocessing gives, for byte-level tokenizers."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from fastllava.batch import IMAGE_ID
from fastllava.data.checks import Record
from fastllava.data.conversation import encode_record
from fastllava.data.marks import check_marks
from fastllava.data.templates import TEMPLATES, template
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError

NAMES = ("llava_next_qwen", "llava_next_llama_3", "llava_next_gemma")
SYSTEM = {
    "llava_next_qwen": "You are a helpful assistant.",
    "llava_next_llama_3": "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.",
}
STOPS = {"llava_next_qwen": "<|im_end|>", "llava_next_llama_3": "<|eot_id|>", "llava_next_gemma": "<end_of_turn>"}
CONVERSATIONS = {
    "with an image": [("human", "<image>\nWhat is this?"), ("gpt", "A red bus.")],
    "of texts": [("human", "Who's there?"), ("gpt", "東京"), ("human", "Sure?"), ("gpt", "-")],
    # A line break alone is one token, two are another, and one after a full stop is the stop's.
    "with line breaks": [("human", "<image>\nOne\ntwo\n\nthree.\nfour"), ("gpt", "a\nb\n\nc.\nd"), ("human", "e\n f"), ("gpt", "g")],
    "with blanks at the ends": [("human", " a "), ("gpt", " b ")],
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A byte-level tokenizer.json with the template's marks, in which two line breaks are a token and a full stop takes one along."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "ĊĊ", ".Ċ"])}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ"), (".", "Ċ")]))
    # As Qwen and Llama 3 split: punctuation with the line breaks behind it.
    pattern = tokenizers.Regex(r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+| ?[\p{L}\p{N}]+|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    model.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<begin>", "<image>", *TEMPLATES[name].marks)])
    begins = name != "llava_next_qwen"
    if begins:
        begin = ("<begin>", model.token_to_id("<begin>"))
        model.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[begin])
    model.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<begin>"} if begins else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**names, "eos_token": STOPS[name]}))
    return tmp_path


def theirs(name: str, tokenizer: tokenizers.Tokenizer, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids and what is supervised, as its three functions go about it."""
    number = tokenizer.token_to_id
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    ids: list[int] = [] if name == "llava_next_qwen" else [number("<begin>")]
    learned = [False] * len(ids)
    if name == "llava_next_gemma":
        # By lengths, round for round: all behind the answer's header, with the two tokens of the separator.
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            asked = f"<start_of_turn>user\n{question[1]}<end_of_turn>\n<start_of_turn>model\n"
            whole = encode(f"{asked}{answer[1]}") + encode("<end_of_turn>\n")
            ids += whole
            learned += [at >= len(encode(asked)) for at in range(len(whole))]
        return ids, learned
    qwen = name == "llava_next_qwen"
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    for role, text in [("system", SYSTEM[name]), *turns]:
        message = f"<|im_start|>{roles[role]}\n{text}<|im_end|>\n"
        if not qwen:
            message = f"<|start_header_id|>{roles[role]}<|end_header_id|>\n\n{text.strip()}<|eot_id|>"
        new = encode(message)
        ids += new
        learned += [role == "gpt"] * len(new)
    # Qwen's 198 is the line break; the look-up of two finds nothing, as byte-level vocabularies do not spell them so.
    everywhere = (
        [number("Ċ"), number("<|im_start|>"), number("<|im_end|>")]
        if qwen
        else [number(text) for text in ("<begin>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n")]
    )
    assert qwen or everywhere[-1] is None
    return ids, [yes or token in everywhere for token, yes in zip(ids, learned, strict=True)]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_and_supervised_tokens_are_its_own(name: str, folder: Path, conversation: str) -> None:
    turns = CONVERSATIONS[conversation]
    ours, model = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    check_marks(template(name), ours)
    encoded = encode_record(Record("r", ("a.png",) if "<image>" in turns[0][1] else (), turns), template(name), ours, 2**20)
    expected, learned = theirs(name, model, turns)
    image = model.token_to_id("<image>")
    assert [image if i == IMAGE_ID else i for i in encoded.ids] == expected
    found = {at for begin, end in encoded.supervised for at in range(begin, end)}
    assert found == {at for at, yes in enumerate(learned) if yes}


def test_it_supervises_more_than_the_model_s_own_template_and_the_same_answers(name: str, folder: Path) -> None:
    own = {"llava_next_qwen": "qwen_2_5", "llava_next_llama_3": "llama_3", "llava_next_gemma": "gemma"}[name]
    ours, record = Tokenizer.load(folder), Record("r", (), CONVERSATIONS["of texts"])
    texts = []
    for form in (template(own), template(name)):
        encoded = encode_record(record, form, ours, 2**20)
        texts.append([ours.piece(encoded.ids[at]) for begin, end in encoded.supervised for at in range(begin, end)])
    left = list(texts[1])
    for piece in texts[0]:
        left.remove(piece)
    stop, opens = (
        STOPS[name],
        {"llava_next_qwen": "<|im_start|>", "llava_next_llama_3": "<|start_header_id|>", "llava_next_gemma": ""}[name],
    )
    # Of four messages and the system's, the ends of questions too; Gemma's has the line break behind an answer alone.
    assert (left.count(stop), left.count(opens)) == ((0, 0) if name == "llava_next_gemma" else (3, 5))
    assert left.count("Ċ") == {"llava_next_qwen": 10, "llava_next_llama_3": 0, "llava_next_gemma": 2}[name]


def test_of_an_answer_that_is_not_to_be_learned_nothing_is_supervised(folder: Path, name: str) -> None:
    ours, whole = Tokenizer.load(folder), Record("r", (), CONVERSATIONS["of texts"])
    encoded, less = (
        encode_record(record, template(name), ours, 2**20) for record in (whole, Record("r", (), whole.turns, left_out=frozenset({1})))
    )
    assert less.ids == encoded.ids
    both, one = ({at for begin, end in found.supervised for at in range(begin, end)} for found in (encoded, less))
    assert one < both
    gone = [ours.piece(encoded.ids[at]) for at in sorted(both - one)]
    # Two kanji are six bytes.
    answer = [ours.piece(token) for token in ours.encode("東京")]
    before, after = {
        "llava_next_qwen": (["<|im_start|>", *"assistant", "Ċ"], ["<|im_end|>", "Ċ"]),
        "llava_next_llama_3": (["<|start_header_id|>", *"assistant", "<|end_header_id|>", "ĊĊ"], ["<|eot_id|>"]),
        "llava_next_gemma": ([], ["<end_of_turn>", "Ċ"]),
    }[name]
    assert gone == [*before, *answer, *after]


def test_a_tokenizer_in_which_the_line_break_is_several_tokens_is_refused(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "<0x0A>": 1, "▁": 2}, merges=[], unk_token=None))
    model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(UserError, match=r"'llava_next_qwen' writes \\n, which .* has no token for"):
        check_marks(template("llava_next_qwen"), Tokenizer.load(tmp_path))
