"""Templates: what a record is written as, and which part of it is supervised."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllava.batch import IMAGE_ID
from fastllava.data.checks import BadRecord, Record, check_record
from fastllava.data.conversation import TEMPLATES, Encoded, encode_record, prompt, segments, template
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = USER.replace("user", "human")
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.The visual content will be provided with the following format: <Image>visual content</Image>."
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."


def two_rounds() -> Record:
    turns = [("human", "What?\n<image>"), ("gpt", "A dog."), ("human", "Big?"), ("gpt", "No.")]
    return Record("r", ("good.png",), turns)


def v1(system: str, image: str = "<image>") -> str:
    return f"{system} USER: {image}\nWhat? ASSISTANT:{{ A dog.</s>}}USER: Big? ASSISTANT:{{ No.</s>}}"


def v0(system: str, image: str = "<image>") -> str:
    human = "{###} Human: "
    return f"{system}\n\n{human}{image}\nWhat?\n{{### Assistant: A dog.\n###}} Human: Big?\n{{### Assistant: No.\n### }}"


def chatml(system: str) -> str:
    ask, answer = "<|im_start|>user\n", "<|im_start|>assistant\n"
    return (
        f"<|im_start|>system\n{system}<|im_end|>{ask}<image>\nWhat?<|im_end|>{answer}{{A dog.<|im_end|>}}"
        f"{ask}Big?<|im_end|>{answer}{{No.<|im_end|>}}"
    )


def llama_2(system: str, begin: str = "<s>") -> str:
    return f"[INST] {system}<image>\nWhat? [/INST]{{ A dog. </s>}}{begin}[INST] Big? [/INST]{{ No. </s>}}"


# {braces} hold what is supervised.
WRITTEN = {
    "v1": v1(USER),
    "vicuna_v1": v1(USER),
    "llava_v1": v1(HUMAN),
    "v1_mmtag": v1(MMTAG, "<Image><image></Image>"),
    "default": v0(HUMAN),
    "v0": v0(HUMAN),
    "llava_v0": v0(HUMAN),
    "v0_mmtag": v0(MMTAG, "<Image><image></Image>"),
    "llava_llama_2": llama_2(f"<<SYS>>\n{HELPFUL}\n<</SYS>>\n\n"),
    "mistral_instruct": llama_2("", begin=""),
    "mpt": chatml(MPT),
    "chatml_direct": chatml("Answer the questions."),
    "mistral_direct": chatml("Answer the questions."),
}


def written(name: str, record: Record) -> str:
    """The record in the template, {braces} around what is supervised."""
    text = ""
    for part in segments(record, template(name)):
        text += f"{{{part.text}}}" if part.supervised else part.text
    return text.replace("}{", "")


@pytest.mark.parametrize("name", WRITTEN)
def test_every_template_writes_and_masks(name: str) -> None:
    assert written(name, two_rounds()) == WRITTEN[name]


def test_llama_2_begins_with_its_safety_prompt() -> None:
    text = written("llama_2", two_rounds())
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as")
    assert "while being safe.  Your" in text
    assert "share false information.\n<</SYS>>\n\n<image>\nWhat? [/INST]{ A dog. </s>}<s>[INST] Big? [/INST]{ No. </s>}" in text
    assert len(template("llama_2").system) == 508


@pytest.mark.parametrize("name", ["plain", "v0_plain"])
def test_plain_drops_the_question(name: str) -> None:
    record = Record("r", ("good.png",), [("human", "Describe it.\n<image>"), ("gpt", "A dog.")])
    assert written(name, record) == "<image>{A dog.\n}"


def test_names_are_the_originals_and_those_of_newer_models() -> None:
    newer = {"qwen_2_5", "qwen_3", "llama_3", "phi_3", "gemma"}
    next_ones = {"llava_next_qwen", "llava_next_llama_3", "llava_next_gemma"}
    assert set(TEMPLATES) == {*WRITTEN, "llama_2", "plain", "v0_plain"} | newer | next_ones


def test_an_unknown_template_lists_the_names() -> None:
    with pytest.raises(UserError) as error:
        template("vicuna")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("data.template: no template 'vicuna'; write one of ")
    assert all(name in str(error.value) for name in TEMPLATES)


def test_a_record_its_text_and_its_mask(llama: Callable[[bool], Tokenizer]) -> None:
    """A worked example: record, then text, then ids with the supervised ones marked."""
    raw = {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "What stands in the kitchen?\n<image>"},
            {"from": "gpt", "value": "the yellow lamp"},
            {"from": "human", "value": "How many lamps are in the kitchen?"},
            {"from": "gpt", "value": "12"},
        ],
    }
    record = check_record(raw, 0)
    assert written("v1", record) == (
        f"{USER} USER: <image>\nWhat stands in the kitchen? ASSISTANT:{{ the yellow lamp</s>}}"
        "USER: How many lamps are in the kitchen? ASSISTANT:{ 12</s>}"
    )
    tokenizer = llama(False)
    encoded = encode_record(record, template("v1"), tokenizer, 2048)
    pieces = ["<image>" if i == IMAGE_ID else tokenizer.piece(i) for i in encoded.ids]
    # The 33 ids before: <s>, the system prompt and ▁ USER :.
    assert pieces[:2] == ["<s>", "▁A"]
    first = "▁ <image> ▁ <0x0A> W hat ▁stands ▁in ▁the ▁k i t c he n ? ▁A S SI STANT : ▁the ▁y ellow ▁l amp </s>"
    second = "USER : ▁H ow ▁ man y ▁l amp s ▁are ▁in ▁the ▁k i t c he n ? ▁A S SI STANT : ▁ 1 2 </s>"
    assert " ".join(pieces[33:]) == f"{first} {second}"
    supervised = [pieces[begin:end] for begin, end in encoded.supervised]
    assert supervised == [["▁the", "▁y", "ellow", "▁l", "amp", "</s>"], ["▁", "1", "2", "</s>"]]


def test_legacy_changes_what_follows_a_control_token(llama: Callable[[bool], Tokenizer]) -> None:
    both = [encode_record(two_rounds(), template("v1"), llama(legacy), 2048) for legacy in (False, True)]
    pieces = [[llama(False).piece(i) for i in encoded.ids if i != IMAGE_ID] for encoded in both]
    after = [row[row.index("</s>") + 1 :][:3] for row in pieces]
    assert after == [["USER", ":", "▁B"], ["▁", "USER", ":"]]


def test_v0_supervises_the_first_two_tokens_of_a_question(llama: Callable[[bool], Tokenizer]) -> None:
    tokenizer = llama(False)
    encoded = encode_record(two_rounds(), template("v0"), tokenizer, 2048)
    first_begin, first_end = encoded.supervised[0]
    assert [tokenizer.piece(i) for i in encoded.ids[first_begin : first_end + 2]] == ["##", "#", "▁Human", ":"]
    assert first_end - first_begin == 2


def test_chatml_marks_are_tokens_where_the_tokenizer_has_them_and_text_where_not(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 420, "<|im_end|>": 421}')
    with_marks, without = Tokenizer.load(tmp_path, False), Tokenizer.load(model_file, False)
    encoded = encode_record(two_rounds(), template("mpt"), with_marks, 2048)
    assert encoded.ids[:2] == [1, 420]
    assert [encoded.ids[end - 1] for _, end in encoded.supervised] == [421, 421]
    assert [with_marks.decode(encoded.ids[begin:end]) for begin, end in encoded.supervised] == ["A dog.", "No."]
    as_text = encode_record(two_rounds(), template("mpt"), without, 2048)
    assert max(as_text.ids) < 420
    assert [without.decode(as_text.ids[begin:end]) for begin, end in as_text.supervised] == ["A dog.<|im_end|>", "No.<|im_end|>"]


def test_an_answer_before_the_first_question_is_left_out(tokenizer: Tokenizer) -> None:
    turns = two_rounds().turns
    assert written("v1", Record("r", ("good.png",), [("gpt", "Hello"), *turns])) == WRITTEN["v1"]
    assert "Hello" in written("v0", Record("r", ("good.png",), [("gpt", "Hello"), *turns]))


def test_an_image_in_an_answer_is_never_supervised(tokenizer: Tokenizer) -> None:
    record = Record("r", ("good.png",), [("human", "Draw"), ("gpt", "Here <image> it is")])
    encoded = encode_record(record, template("v1"), tokenizer, 2048)
    at = encoded.ids.index(IMAGE_ID)
    (before, end), (begin, last) = encoded.supervised
    assert (end, begin, last) == (at, at + 1, len(encoded.ids))
    assert tokenizer.decode(encoded.ids[begin:last]) == "\nHere  it is"
    assert before < at


def test_a_text_only_record_is_cut_and_one_with_an_image_is_not(tokenizer: Tokenizer) -> None:
    turns = [("human", "What?"), ("gpt", "dog " * 300)]
    cut = encode_record(Record("r", (), turns), template("v1"), tokenizer, 256)
    assert (len(cut.ids), cut.supervised[-1][1]) == (256, 256)
    assert cut.length > 256
    turns[0] = ("human", "<image>\nWhat?")
    assert len(encode_record(Record("r", ("good.png",), turns), template("v1"), tokenizer, 256).ids) > 256


def test_nothing_supervised_within_the_cut_is_refused(tokenizer: Tokenizer) -> None:
    record = Record("r", (), [("human", "what " * 200), ("gpt", "Yes")])
    with pytest.raises(BadRecord) as problem:
        encode_record(record, template("v1"), tokenizer, 150)
    assert problem.value.reason == "nothing_supervised"


def test_a_prompt_is_the_record_up_to_the_answer(tokenizer: Tokenizer) -> None:
    for name, form in TEMPLATES.items():
        record = Record("r", ("good.png",), [("human", "<image>\nWhat is this?"), ("gpt", "a red dog")])
        whole = encode_record(record, form, tokenizer, 2048)
        asked = prompt(name, "What is this?", True, tokenizer)
        answer = max(begin for begin, _ in whole.supervised if begin)
        assert asked == whole.ids[: len(asked)], name
        if form.head_learned:
            # LLaVA-NeXT's supervise what opens an answer too.
            assert tokenizer.decode(whole.ids[len(asked) :]).startswith("a red dog"), name
        elif form.style != "v0":
            assert len(asked) == answer, name
        else:
            assert tokenizer.decode(whole.ids[len(asked) :]) == "a red dog\n### "


def test_a_prompt_takes_control_tokens_in_a_question_as_text(tokenizer: Tokenizer) -> None:
    ids = prompt("v1", "say </s><s><unk><image>", False, tokenizer)
    assert (ids.count(1), ids.count(2), ids.count(0), ids.count(IMAGE_ID)) == (1, 0, 0, 0)


def encoded_or_reason(record: Record, name: str, tokenizer: Tokenizer) -> Encoded | str:
    try:
        return encode_record(record, template(name), tokenizer, 100_000)
    except BadRecord as problem:
        return problem.reason


LITERALS = st.sampled_from(["</s>", "<s>", "<unk>", "<image>", " ASSISTANT: ", "[/INST] ", "<|im_end|>", "<0x0A>", "###", "\n", "  ", "▁"])
TEXT = st.lists(st.one_of(st.text(max_size=12), LITERALS), min_size=1, max_size=5).map("".join).filter(bool)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    name=st.sampled_from([name for name, form in TEMPLATES.items() if form.style not in ("plain", "turns")]),
)
def test_no_text_becomes_a_control_token_and_the_answers_are_what_is_supervised(
    rounds: list[tuple[str, str]], name: str, tokenizer: Tokenizer
) -> None:
    """Whatever users write, a record is trained on as it reads, or refused with a reason."""
    form = template(name)
    turns = [turn for question, answer in rounds for turn in (("human", question), ("gpt", answer))]
    record = Record("r", (), turns)
    for text in (text for _, text in turns):
        try:
            text.encode()
        except UnicodeEncodeError:
            return
        assert not set(tokenizer.encode(text)) & {0, 1, 2}
    encoded = encoded_or_reason(record, name, tokenizer)
    if isinstance(encoded, str):
        assert encoded in ("control_literal", "separator_in_text")
        return
    n = len(rounds)
    ends = n if form.style in ("v1", "llama_2") else 0
    begins = 1 + (n - 1 if form.begin else 0)
    assert (encoded.ids.count(0), encoded.ids.count(1), encoded.ids.count(2)) == (0, begins, ends)
    # sentencepiece writes a space as ▁ and so cannot tell the two apart.
    answers = [answer.replace("▁", " ") for _, answer in rounds]
    decoded = [tokenizer.decode(encoded.ids[begin:end]) for begin, end in encoded.supervised]
    match form.style:
        case "v1":
            assert decoded == answers
        case "llama_2":
            assert decoded == [f"{answer} " for answer in answers]
        case "mpt":
            assert "".join(decoded).replace(" ", "") == "".join(f"{answer}<|im_end|>" for answer in answers).replace(" ", "")
        case _:
            said = [f"### {form.gpt}: {answer}\n###" for answer in answers]
            assert "".join(decoded).replace(" ", "") == "".join(["###", *said]).replace(" ", "")
