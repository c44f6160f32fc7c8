"""Concept-balanced sampling takes what the paper's rule says, whatever the order of the phrases."""

from collections import Counter

import pytest

from fastllava.errors import UserError
from fastllava.mix.concepts import Balance, Balancer, plain_phrases


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a red dog on the grass", {"red dog", "grass"}),
        (
            "select luxury furniture 3 - inch gel memory foam mattress topper",
            {"select luxury furniture 3", "inch gel memory foam mattress topper"},
        ),
        ("The man's hat, and his old-fashioned coat.", {"man's hat", "old-fashioned coat"}),
        ("it is of the", set()),
        ("", set()),
    ],
)
def test_phrases_without_a_model(caption, phrases):
    assert plain_phrases(caption) == phrases


def balanced(run, captions: list[str], **balance) -> list[str]:
    rows = [(str(number), f"{number}.jpg", caption) for number, caption in enumerate(captions)]
    return [caption for _, _, caption in Balancer(Balance(**balance), run).balanced(iter(rows))]


def test_rare_phrases_are_passed_over_and_frequent_ones_are_sampled(run):
    captions = [*["a dog"] * 500, *["a zebra"] * 3, *["an okapi"] * 2, "a dog with a zebra", "an okapi with a dog"]
    taken = Counter(balanced(run, captions))
    # zebra comes four times and is taken whole; okapi comes three times and is, too; of the dogs a hundred are drawn.
    assert taken["a zebra"] == 3
    assert taken["an okapi"] == 2
    assert taken["a dog with a zebra"] == taken["an okapi with a dog"] == 1
    assert 98 <= taken["a dog"] <= 100
    assert run.dropped.reasons["balance"] == len(captions) - taken.total()


def test_the_order_is_kept_and_bounds_are_the_config_s(run):
    captions = [f"a dog {'in' if number % 2 else 'on'} place number{number}" for number in range(40)]
    taken = balanced(run, captions, least=2, most=10)
    assert len(taken) == 10
    assert taken == [caption for caption in captions if caption in taken]


def test_the_same_captions_are_taken_whatever_comes_after(run, tmp_path):
    captions = [f"a dog and thing{number}" for number in range(50)]
    first = balanced(run, captions, most=5)
    assert first == balanced(run, captions, most=5)


def test_without_spacy_the_remedy_is_told(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(UserError, match=r"balance.phrases: spacy needs spaCy .*; pip install spacy, .*or write balance.phrases: words"):
        balanced(run, ["a dog"], phrases="spacy")


def test_spacy_s_noun_chunks_are_asked_for(run, monkeypatch):
    class Chunk:
        def __init__(self, text: str) -> None:
            self.text = text

    class Document:
        def __init__(self, text: str) -> None:
            self.noun_chunks = [Chunk(text.upper())]

    class Model:
        @staticmethod
        def pipe(texts: list[str]) -> list[Document]:
            return [Document(text) for text in texts]

    class Spacy:
        @staticmethod
        def load(name: str, exclude: list[str]) -> Model:
            assert name == "en_core_web_sm"
            return Model()

    monkeypatch.setitem(__import__("sys").modules, "spacy", Spacy)
    assert balanced(run, ["a dog", "a dog", "A dog", "a cat"], phrases="spacy") == ["a dog", "a dog", "A dog"]
