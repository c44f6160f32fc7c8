"""The chat templates of exports: the text, the ids and the supervised tokens of training, as transformers renders and tokenizes them."""

import io
import json
from dataclasses import replace

import pytest
import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fastllava.config import ModelConfig
from fastllava.data.checks import Record
from fastllava.data.conversation import encode_record
from fastllava.data.marks import check_marks
from fastllava.data.templates import TEMPLATES
from fastllava.data.tokenizer import Tokenizer as OurTokenizer
from fastllava.errors import UserError
from fastllava.export.chat_template import chat_template
from fastllava.model.weights.tokenizer_files import find_tokenizer, write_hf

EXPORTED = [name for name, form in TEMPLATES.items() if chat_template(form) is not None]
MARKS = sorted({mark for form in TEMPLATES.values() if form.style in ("mpt", "turns") for mark in form.marks})
TEXT = ["USER: what is this? ASSISTANT: a red bus", "def f(x):\n    return x", "naïve café 東京"] * 3
CONVERSATIONS = [
    [("human", "<image>\nWhat is this?"), ("gpt", "A red bus.")],
    [("human", "What is this?\n<image>"), ("gpt", "A bus"), ("human", "Sure?"), ("gpt", "Yes, it's red.")],
    [
        ("human", "Who's there?"),
        ("gpt", "東京"),
        ("human", "  Two spaces,\n\ttab "),
        ("gpt", " Led by a space.\n"),
        ("human", "c"),
        ("gpt", "-"),
    ],
]


def sentencepiece_folder(folder, legacy):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {str(size + at): {"content": mark, "special": True} for at, mark in enumerate(MARKS)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy, "added_tokens_decoder": added}))


def byte_level_folder(folder, begins):
    """A folder with a tokenizer as Llama 3's, which puts its beginning token itself, or as Qwen's, which has none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<|begin|>", "<|stop|>", *MARKS)])
    if begins:
        begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[begin])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin|>"} if begins else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "eos_token": "<|stop|>"}))


@pytest.fixture(scope="module", params=["sentencepiece", "sentencepiece legacy", "byte level", "byte level that begins"])
def tokenizers_of(request, tmp_path_factory):
    """Training's tokenizer, and transformers' of the same in an export."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    if request.param.startswith("byte level"):
        byte_level_folder(source, request.param.endswith("begins"))
    else:
        sentencepiece_folder(source, request.param.endswith("legacy"))
    found = find_tokenizer(ModelConfig(llm=source), None)
    assert found is not None
    write_hf(found, out, None, 2048)
    return OurTokenizer.load(source), transformers.AutoTokenizer.from_pretrained(out)


def messages_of(turns, parts):
    roles = {"human": "user", "gpt": "assistant"}
    if not parts:
        return [{"role": roles[role], "content": text} for role, text in turns]
    shown = lambda text: [{"type": "image"}] if "<image>" in text else []  # noqa: E731
    return [{"role": roles[role], "content": [*shown(text), {"type": "text", "text": text.replace("<image>", "")}]} for role, text in turns]


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("name", EXPORTED)
def test_ids_and_answers_are_those_of_training(tokenizers_of, name, parts):
    ours, theirs = tokenizers_of
    form = TEMPLATES[name]
    if form.begin and ours.bos_id is None:
        with pytest.raises(UserError, match=r"writes <s> \(bos_token\), which .* has no token for"):
            check_marks(form, ours)
        return
    image = theirs.convert_tokens_to_ids("<image>")
    for turns in CONVERSATIONS:
        shows = any("<image>" in text for _, text in turns)
        expected = encode_record(Record("r", ("image",) if shows else (), turns), form, ours, 2**20)
        ids = [image if i < 0 else i for i in expected.ids]
        messages = messages_of(turns, parts)
        text = theirs.apply_chat_template(messages, chat_template=chat_template(form), tokenize=False)
        assert theirs(text).input_ids == ids
        found = theirs.apply_chat_template(
            messages, chat_template=chat_template(form), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        # A tokenizer's own call puts no beginning token before what its template writes.
        first = 0 if ours.bos_id is None else 1
        assert found["input_ids"] == ids[first:]
        marked = [first + at for at, yes in enumerate(found["assistant_masks"]) if yes]
        # What a template supervises in questions too, a chat template cannot mark.
        answers = encode_record(Record("r", ("image",) if shows else (), turns), replace(form, everywhere=()), ours, 2**20)
        assert answers.ids == expected.ids
        learned = [at for begin, end in answers.supervised for at in range(begin, end)]
        if name.startswith("llava_next_") and transformers.__version__.startswith("4."):
            # Where a legacy tokenizer makes two tokens of the line's end after a mark, transformers 4.57 finds the first of them only.
            learned = [at for at in learned if at in marked or at + 1 in learned]
        assert marked == learned
        # An open question is the beginning of the same text.
        opened = theirs.apply_chat_template(messages[:-1], chat_template=chat_template(form), tokenize=False, add_generation_prompt=True)
        assert text.startswith(opened)
        assert text[len(opened) :].lstrip(" ").startswith(turns[-1][1].lstrip(" "))


@pytest.mark.parametrize("name", EXPORTED)
def test_a_system_message_replaces_the_templates_own(tokenizers_of, name):
    form, (_, theirs) = TEMPLATES[name], tokenizers_of
    question = {"role": "user", "content": "Who?"}
    render = lambda *messages: theirs.apply_chat_template(list(messages), chat_template=chat_template(form), tokenize=False)  # noqa: E731
    if not form.takes_system:
        with pytest.raises(Exception, match="training has seen no system message; take it out"):
            render({"role": "system", "content": "It's short."}, question)
        return
    text = render({"role": "system", "content": "It's short."}, question)
    assert text == render({"role": "system", "content": [{"type": "text", "text": "It's short."}]}, question)
    assert text.count("It's short.") == 1
    if form.system:
        assert form.system not in text
        assert text == render(question).replace(form.system, "It's short.")


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize(
    ("roles", "words"),
    [
        (["user", "tool"], "the role tool is unknown here; write user and assistant, and system before them"),
        (["user", "system"], "the role system is unknown here"),
        (["user", "user"], "two user messages in a row"),
        (["assistant"], "an answer before a question"),
    ],
)
def test_what_training_has_never_seen_raises(tokenizers_of, name, roles, words):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(Exception, match=words):
        tokenizers_of[1].apply_chat_template(messages, chat_template=chat_template(TEMPLATES[name]), tokenize=False)


def test_the_marks_are_spelled_as_tools_look_for_them():
    for name in EXPORTED:
        text = chat_template(TEMPLATES[name]) or ""
        assert (text.count("{% generation %}"), text.count("{% endgeneration %}")) == (1, 1)
    assert chat_template(TEMPLATES["plain"]) is None
    assert {"v1", "vicuna_v1", "llava_llama_2", "mpt", "chatml_direct"} <= set(EXPORTED)
