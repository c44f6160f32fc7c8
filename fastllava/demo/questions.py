"""What is asked about a scene: question types with several phrasings each, answers right by construction, and captions.

No question names what another one asks for: in a conversation of several it would give the answer away without the picture.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from fastllava.demo.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene
from fastllava.evaluate.benchmark import OPTION_LETTER

LETTERS = "ABCDE"


@dataclass(frozen=True)
class Question:
    """A question of one type with its one right answer."""

    kind: str
    text: str
    answer: str

    def with_options(self) -> "Question":
        """The same question in the form of ScienceQA: options follow it, and a letter answers it. KeyError where they are too many."""
        options = CHOICES[self.kind]
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        return Question(self.kind, f"{self.text}{listed}{OPTION_LETTER}", LETTERS[options.index(self.answer)])


def ask(kind: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question of type `kind` that has exactly one right answer in this scene; None when the scene allows none."""
    answer = KINDS[kind](scene)
    return None if answer is None else Question(kind, rng.choice(_PHRASINGS[kind]), answer)


def ask_several(scene: Scene, number: int, rng: random.Random) -> list[Question]:
    """At most `number` questions of different types, in a random order; in every other conversation one of them has options."""
    found = [ask(kind, scene, rng) for kind in rng.sample(list(KINDS), len(KINDS))]
    asked = [question for question in found if question is not None][:number]
    able = [index for index, question in enumerate(asked) if question.kind in CHOICES]
    if able and rng.random() < 0.5:
        index = rng.choice(able)
        asked[index] = asked[index].with_options()
    return asked


def caption(scene: Scene, rng: random.Random) -> str:
    """One sentence that names number, colour, shape, background and places."""
    number = ("One", "Two", "Three", "Four")[len(scene.places) - 1]
    things = f"{scene.colour} {scene.shape}" + ("s" if len(scene.places) > 1 else "")
    places = [PLACES[place] for place in scene.places]
    listed = places[0] if len(places) == 1 else ", ".join(places[:-1]) + f" and {places[-1]}"
    ways = (f"{number} {things} on {scene.background}: {listed}.", f"{number} {things} at the {listed}, on {scene.background}.")
    return rng.choice(ways)


def text_question(rng: random.Random) -> Question:
    """A question that needs no picture."""
    return Question("text", *rng.choice(_TEXT_QUESTIONS))


def _position(scene: Scene) -> str | None:
    return PLACES[scene.places[0]] if len(scene.places) == 1 else None


KINDS: dict[str, Callable[[Scene], str | None]] = {
    "colour": lambda scene: scene.colour,
    "shape": lambda scene: scene.shape,
    "count": lambda scene: str(len(scene.places)),
    "position": _position,
    "background": lambda scene: scene.background,
}
"""The question types by name, each with its answer; None where the scene allows no such question."""

CHOICES = {"shape": SHAPES, "count": tuple("1234"), "position": PLACES, "background": tuple(BACKGROUNDS)}
"""The options of the types that have at most as many as ScienceQA has letters."""

_PHRASINGS = {
    "colour": ("What colour are the things?", "Which colour do the things have?", "Tell me the colour of what you see."),
    "shape": ("What shape are the things?", "Which shape do you see?", "Tell me the shape of what you see."),
    "count": ("How many things are there?", "How many things do you see?", "Count the things."),
    "position": ("Where is it?", "In which corner is it?", "Tell me where it is."),
    "background": ("What colour is the background?", "Which colour is behind the things?", "Tell me the colour of the background."),
}
_TEXT_QUESTIONS = (
    ("How many corners does a triangle have?", "3"),
    ("How many corners does a square have?", "4"),
    ("Which shape has no corners?", "circle"),
    ("Which shape has three corners?", "triangle"),
    *((f"Is {colour} a colour or a shape?", "colour") for colour in COLOURS),
    *((f"Is a {shape} a colour or a shape?", "shape") for shape in SHAPES),
)
