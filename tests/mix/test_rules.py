"""Every rule by itself."""

import contextlib
import re
import time
from collections import Counter

import pytest
from hypothesis import given, strategies

from fastllava.mix import rules, sharegpt
from fastllava.mix.boxes import Box, box_text, on_padded_square, on_picture, within
from fastllava.mix.conversation import BadRow, Conversation, Pair, record_of
from fastllava.mix.draw import Draw

DRAW = Draw(0, "source")
PAIRS = [Pair("Q1", "a"), Pair("Q2", "b")]


def test_the_prompt_stands_after_the_first_question_or_after_every():
    assert rules.with_prompt(PAIRS, "P") == [Pair("Q1\nP", "a"), Pair("Q2", "b")]
    assert rules.with_prompt(PAIRS, "P", "every") == [Pair("Q1\nP", "a"), Pair("Q2\nP", "b")]
    assert rules.with_prompt(PAIRS, "P", "none") == rules.with_prompt(PAIRS, "") == PAIRS


def test_rotations_keep_the_right_choice():
    choices = ["skateboarder", "train", "delivery", "cab"]
    found = [rules.rotated(choices, 3, by) for by in range(5)]
    assert found[1] == (["train", "delivery", "cab", "skateboarder"], 2)
    assert all(rotated[correct] == "cab" for rotated, correct in found)
    assert sorted(correct for _, correct in found[:4]) == [0, 1, 2, 3]
    assert found[4] == found[0]
    assert rules.multiple_choice("Q", *found[1]) == Pair("Q\nA. train\nB. delivery\nC. cab\nD. skateboarder", "C")


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (9, [9]), (10, [9, 1]), (18, [9, 9]), (23, [9, 9, 5])])
def test_segments_have_fewer_than_ten(count, sizes):
    found = list(rules.segments(list(range(count)), 10))
    assert [len(part) for part in found] == sizes
    assert [item for part in found for item in part] == list(range(count))


def test_answer_of_many():
    answers = ["b", "a", "a", "b", "c"]
    assert rules.answer_of_many(answers, "most_common", DRAW, 1) == "b"
    assert rules.answer_of_many(answers, "first", DRAW, 1) == "b"
    assert {rules.answer_of_many(answers, "random", DRAW, key) for key in range(50)} == {"a", "b", "c"}


def test_capitals_touch_the_first_letter_alone():
    assert [rules.capitalised(text) for text in ("yes", "NaN x", "élan", "2", "")] == ["Yes", "NaN x", "Élan", "2", ""]


def test_regions_are_asked_in_both_ways_and_close_with_one_full_stop():
    describe, locate = (rules.region_pair("A dog.", "[0.1, 0.2, 0.3, 0.4]", form, DRAW, 1) for form in ("describe", "locate"))
    assert describe == Pair("Please provide a short description for this region: [0.1, 0.2, 0.3, 0.4].", "A dog.")
    assert locate == Pair(
        "Please provide the bounding box coordinate of the region this sentence describes: A dog.", "[0.1, 0.2, 0.3, 0.4]"
    )
    drawn = Counter(rules.region_pair("x", "b", "random", DRAW, key).answer for key in range(1000))
    assert 400 < drawn["x"] < 600


def test_the_image_stands_before_or_after():
    assert rules.with_image("Q", "before", DRAW, 1) == "<image>\nQ"
    assert rules.with_image("Q", "after", DRAW, 1) == "Q\n<image>"
    drawn = Counter(rules.with_image("Q", "random", DRAW, key) for key in range(1000))
    assert 400 < drawn["Q\n<image>"] < 600


def test_ocr_tokens():
    assert rules.with_ocr_tokens("P", ["a", "b"]) == "P\nReference OCR token: a, b"
    assert rules.with_ocr_tokens("P", []) == "P\nReference OCR token: "
    assert rules.with_ocr_tokens("P", [], always=False) == "P"


def test_captions_that_are_taken():
    captions = ["a", "b", "c"]
    assert rules.some_captions(captions, "first", DRAW, 1) == ["a"]
    assert rules.some_captions(captions, "all", DRAW, 1) == captions
    assert {rules.some_captions(captions, "random", DRAW, key)[0] for key in range(50)} == set(captions)


def test_draws_depend_on_seed_source_and_key_alone():
    assert DRAW.number(1, 2) == Draw(0, "source").number(1, 2)
    assert len({DRAW.number(1, 2), DRAW.number(12), DRAW.number(2, 1), Draw(1, "source").number(1, 2), Draw(0, "other").number(1, 2)}) == 5
    assert DRAW.some("abcdef", 6, 1) == list("abcdef")
    taken = DRAW.some("abcdef", 3, 1)
    assert len(taken) == 3
    assert taken == sorted(taken)
    assert sorted(DRAW.indexes(100, "x").tolist()) == list(range(100))
    counts = Counter(letter for key in range(2000) for letter in DRAW.some("abcdef", 2, key))
    assert all(550 < count < 790 for count in counts.values())


@pytest.mark.parametrize(
    ("width", "height", "box", "text"),
    [
        (100, 100, (0, 64, 30, 76), "[0.0, 0.64, 0.3, 0.76]"),
        (101, 50, (57, 30, 100, 44), "[0.56, 0.54, 0.99, 0.68]"),
        (50, 101, (0, 0, 50, 101), "[0.25, 0.0, 0.74, 1.0]"),
    ],
)
def test_boxes_on_the_padded_square(width, height, box, text):
    assert box_text(on_padded_square(Box(*box), width, height)) == text


def test_boxes_on_the_picture_itself():
    assert box_text(on_picture(Box(0, 10, 100, 25), 100, 50)) == "[0.0, 0.2, 1.0, 0.5]"


def test_a_box_is_cut_at_the_picture_and_needs_an_area():
    assert within(Box(-5, 2, 20, 99), 10, 10) == Box(0, 2, 10, 10)
    assert within(Box(10, 2, 20, 9), 10, 10) is None
    assert within(Box(3, 3, 3, 9), 10, 10) is None


def test_leading_pairs_and_fastchat_s_split():
    assert sharegpt.leading([5, 5, 5, 5, 5], 20) == 4
    assert sharegpt.leading([5, 5, 5, 6], 20) == 2
    assert sharegpt.leading([15, 6], 20) == 0
    assert sharegpt.split([5, 5, 5, 5], 20) == [(0, 4)]
    assert sharegpt.split([5, 5, 5, 6], 20) == [(0, 2)], "the last pair is lost, as FastChat loses it"
    assert sharegpt.split([5, 5, 5, 6, 1, 1], 20) == [(0, 2), (2, 6)]
    assert sharegpt.split([30, 5], 20) == [(0, 0)]


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a <b>b</b></p>", "a **b**"),
        ("<p>Sure:</p><pre><code>python<div><button>Copy code</button></div>x = 1\n</code></pre>", "Sure:\n```python\nx = 1\n```"),
        ("3 / 4<p>Yes.</p>", "Yes."),
        ("<p>Yes 3 / 4.</p>", "Yes 3 / 4."),
        ("<p>a</p>Copy12 chars / 3 words", "a"),
        ("a\n\n\nb", "a\nb"),
        ("snake_case", "snake\\_case"),
        ("<" * 3000, "<" * 3000),
    ],
)
def test_html_becomes_markdown(html, text):
    assert sharegpt.markdown(html) == text


@pytest.mark.parametrize("part", ["<div", "<a ", "<!--", "```", "<" * 9, "<p>", "Copy code```", "```Copy code"])
def test_what_is_made_to_keep_the_parser_busy_is_left_out_in_seconds(part):
    begun = time.monotonic()
    with contextlib.suppress(sharegpt.Left):
        sharegpt.markdown(part * (100_000 // len(part)))
    assert time.monotonic() - begun < 20


@given(
    strategies.lists(strategies.sampled_from(["```", "Copy code", "\n", " ", "x", "`", "<div", "<span", ">", "a>b"]), max_size=14).map(
        "".join
    )
)
def test_each_of_fastchat_s_expressions_is_kept_to(text):
    code = re.compile(r"```\s*(.*?)(?:Copy code)+(.+?)\s*?```", re.DOTALL)
    assert sharegpt._with_code_blocks(text) == code.sub(r"```\g<1>\n\g<2>\n```", text)
    assert sharegpt._without_empty_code(text) == re.sub(r"```(.*?)Copy code\s*```", "", text)
    assert sharegpt._without_tags(text, "<div") == re.sub("<div.*?>", "", text)


def turns(*texts: str) -> list[tuple[str, str]]:
    return [(("human", "gpt")[number % 2], text) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (turns("Only a question that is long"), "sharegpt_short"),
        (turns("Hi", "Hello."), "sharegpt_short"),
        (turns("What is ChatGPT made of?", "Many matrices."), "sharegpt_blocked"),
        (turns("Tell me a story please.", "Too many requests in 1 hour. Try again later."), "sharegpt_blocked"),
        ([("human", "First question here."), ("human", "Second one."), ("gpt", "An answer.")], "sharegpt_roles"),
        ([], "sharegpt_short"),
    ],
)
def test_what_cleaning_leaves_out(given, left):
    with pytest.raises(sharegpt.Left) as found:
        sharegpt.cleaned(given)
    assert found.value.reason == left


def test_what_cleaning_keeps():
    answers = turns("Question number one?", "Answer number one.", "Two?", "", "Three?", "Never reached.")
    assert sharegpt.cleaned(answers) == answers[:2]
    assert sharegpt.cleaned([("gpt", "Hello."), *answers[:2], ("human", "And?")]) == answers[:2]
    assert sharegpt.cleaned(turns("a_b is long enough?", "*c*"), html=False) == turns("a_b is long enough?", "*c*")


def test_lists_and_digits_that_repeat():
    assert sharegpt.repeats_numbering(turns("q", "x\n1. a\n1. b"))
    assert not sharegpt.repeats_numbering(turns("q", "x\n1. a\n2. b\n1. c"))
    assert sharegpt.repeats_digits(turns("q", "0.3333333333"))
    assert not sharegpt.repeats_digits(turns("q", "123456789123"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Conversation(1, "a.png", []), "no_pairs"),
        (Conversation(1, "a.png", [Pair("Q", " ")]), "empty"),
        (Conversation(1, None, [Pair("", "a")]), "empty"),
        (Conversation(1, "a.png", [Pair("Q", "a"), Pair(" ", "a")]), "empty"),
        (Conversation(1, "a.png", [Pair("see <image>", "a")]), "image_word"),
        (Conversation(1, None, [Pair("see <image>", "a")]), "image_word"),
        (Conversation(1, "a.png", [Pair("Q", "a")], placed=True), "image_word"),
    ],
)
def test_what_training_could_not_take_is_no_record(given, reason):
    with pytest.raises(BadRow) as found:
        record_of(given, "")
    assert found.value.reason == reason


def test_a_record():
    asked = Conversation("1", "a.png", PAIRS, extra={"model": ""})
    assert record_of(asked, "own/street") == {
        "id": "1",
        "image": "own/street/a.png",
        "model": "",
        "conversations": [
            {"from": "human", "value": "<image>\nQ1"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "Q2"},
            {"from": "gpt", "value": "b"},
        ],
    }
