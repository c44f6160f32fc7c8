"""Questions to conversations: all of an image in one, or each by itself."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from fastllava.mix.conversation import Conversation, Pair
from fastllava.mix.rules import PromptAt, with_prompt
from fastllava.mix.run import Run


class MergeRules(Protocol):
    """What the rules of a source say of it."""

    @property
    def merge_by_image(self) -> bool:
        """All questions of an image in one conversation."""
        ...

    @property
    def prompt(self) -> str:
        """The format prompt."""
        ...

    @property
    def prompt_at(self) -> PromptAt:
        """Which questions it follows."""
        ...


Asked = tuple[str, str | int, str | int, Pair]
"""An image's path, the id of its conversation, the id of the question by itself, and the question with its answer."""


def about_images(asked: Iterable[Asked], rules: MergeRules, run: Run) -> Iterator[Conversation]:
    """Conversations in the order in which their images come first, each with its questions in their order."""
    if not rules.merge_by_image:
        for image, _, own_id, pair in asked:
            yield Conversation(own_id, image, with_prompt([pair], rules.prompt, rules.prompt_at))
        return
    groups = run.groups()
    for image, image_id, _, pair in asked:
        groups.add(image, [image_id, *pair])
    for image, found in groups:
        pairs = [Pair(question, answer) for _, question, answer in found]
        yield Conversation(found[0][0], image, with_prompt(pairs, rules.prompt, rules.prompt_at))
