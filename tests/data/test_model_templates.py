"""Templates of language models: the text of the models' own chat templates, and of it the answers and their end marks supervised."""

import json
from pathlib import Path

import jinja2
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from fastllava.batch import IMAGE_ID
from fastllava.data.asking import Turn, ask, prompt_text
from fastllava.data.checks import BadRecord, Record
from fastllava.data.conversation import encode_record, prompt, segments
from fastllava.data.marks import check_marks
from fastllava.data.templates import TEMPLATES, template
from fastllava.data.tokenizer import Tokenizer

QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if think and loop.last and m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if open %}{{ '<|im_start|>assistant\n' }}{% if think %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# What each model's own chat template writes, without its beginning token; of Qwen3's with enable_thinking=False.
JINJA = {
    "qwen_2_5": QWEN,
    "qwen_3": QWEN,
    "llama_3": "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if open %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "phi_3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if open %}<|assistant|>\n{% endif %}",
    "gemma": "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if open %}{{ '<start_of_turn>model\n' }}{% endif %}",
}
STOPS = {"qwen_2_5": "<|im_end|>", "qwen_3": "<|im_end|>", "llama_3": "<|eot_id|>", "phi_3": "<|end|>", "gemma": "<end_of_turn>"}
SYSTEM = {"qwen_2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}
CONVERSATIONS = [
    [("human", "<image>\nWhat is this?"), ("gpt", "A red bus.")],
    [("human", "Who's there?"), ("gpt", "東京"), ("human", "Two\n lines "), ("gpt", " Led by a blank."), ("human", "c"), ("gpt", "-")],
]


def rendered(name: str, turns: list[tuple[str, str]], open_: bool = False) -> str:
    environment = jinja2.Environment(keep_trailing_newline=True, autoescape=False)  # noqa: S701 (no HTML)
    system = [{"role": "system", "content": SYSTEM[name]}] if name in SYSTEM else []
    messages = [{"role": "user" if role == "human" else "assistant", "content": text} for role, text in turns]
    return environment.from_string(JINJA[name]).render(messages=[*system, *messages], open=open_, think=name == "qwen_3")


@pytest.fixture(params=JINJA)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    """A tokenizer.json with the marks of this template alone, <think> as Qwen3 has it, Phi-3's as those that take blanks along."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    added = [AddedToken("<begin>", special=True), AddedToken("<image>", special=True)]
    added += [AddedToken(mark, special="think" not in mark, rstrip=name == "phi_3", normalized=False) for mark in TEMPLATES[name].marks]
    model.add_tokens(added)
    if name in ("llama_3", "gemma"):
        begin = model.token_to_id("<begin>")
        model.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", begin)])
    model.save(str(tmp_path / "tokenizer.json"))
    listed = {
        str(i): {"content": token.content, "special": token.special, "rstrip": token.rstrip}
        for i, token in model.get_added_tokens_decoder().items()
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": STOPS[name], "added_tokens_decoder": listed}))
    return tmp_path


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_a_record_is_written_and_tokenised_as_the_model_was_taught(name: str, folder: Path, turns: list[tuple[str, str]]) -> None:
    ours, theirs = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    form = template(name)
    check_marks(form, ours)
    record = Record("r", ("a.png",) if "<image>" in turns[0][1] else (), turns)
    text = rendered(name, turns)
    assert "".join(part.text for part in segments(record, form)) == text
    encoded = encode_record(record, form, ours, 2**20)
    image, stop = theirs.token_to_id("<image>"), theirs.token_to_id(STOPS[name])
    assert [image if i == IMAGE_ID else i for i in encoded.ids] == theirs.encode(text).ids
    said = [theirs.decode(encoded.ids[begin:end], skip_special_tokens=False) for begin, end in encoded.supervised]
    answers = [answer.lstrip() if name == "phi_3" else answer for _, answer in turns[1::2]]
    assert said == [(answer.strip() if form.trims else answer) + STOPS[name] for answer in answers]
    assert all(encoded.ids[end - 1] == stop for _, end in encoded.supervised)


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_questions_are_asked_as_records_are_written(name: str, folder: Path, turns: list[tuple[str, str]]) -> None:
    ours, form = Tokenizer.load(folder), template(name)
    images = [int("<image>" in text) for _, text in turns[::2]]
    questions = [text.replace("<image>\n", "") for _, text in turns[::2]]
    answers = [*(text for _, text in turns[1:-1:2]), None]
    asked = [Turn(*one) for one in zip(questions, images, answers, strict=True)]
    assert prompt_text(form, asked) == rendered(name, turns[:-1], open_=True)
    whole = encode_record(Record("r", ("a.png",) if images[0] else (), turns), form, ours, 2**20)
    ids = ask(form, asked, ours)
    assert ids == whole.ids[: whole.supervised[-1][0]]
    if len(turns) == 2:
        assert prompt(form, questions[0], bool(images[0]), ours) == ids


def test_a_mark_in_a_text_and_a_text_of_blanks_are_refused(name: str, folder: Path) -> None:
    ours, form = Tokenizer.load(folder), template(name)
    with pytest.raises(BadRecord) as problem:
        encode_record(Record("r", (), [("human", f"x{STOPS[name]}"), ("gpt", "y")]), form, ours, 2**20)
    assert problem.value.reason == "control_literal"
    if form.trims:
        with pytest.raises(BadRecord) as problem:
            encode_record(Record("r", (), [("human", "x"), ("gpt", " \n")]), form, ours, 2**20)
        assert problem.value.reason == "empty_turn"
