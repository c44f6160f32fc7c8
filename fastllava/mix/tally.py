"""What a set of records holds: records, turns, prompts, tokens; counted in the same way in a built mix and in a given file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllava.data.tokenizer import Tokenizer
from fastllava.mix.conversation import IMAGE


@dataclass
class Tally:
    """Counts of one source, or of one kind of records."""

    records: int = 0
    with_image: int = 0
    tokens: int = 0
    """Ids of all texts, without template and image."""
    histogram: Counter[int] = field(default_factory=Counter)
    """Records by their number of questions."""
    prompts: Counter[str] = field(default_factory=Counter)
    """Questions by their format prompt."""

    def add(self, record: Mapping[str, Any], prompts: Sequence[str], tokenizer: Tokenizer | None) -> None:
        """Counts a record in; `prompts` are those of its questions (`kinds.prompts_of`)."""
        self.records += 1
        self.with_image += "image" in record
        self.histogram[len(prompts)] += 1
        self.prompts.update(prompts)
        if tokenizer is not None:
            self.tokens += sum(len(tokenizer.encode(turn["value"].replace(IMAGE, ""))) for turn in record["conversations"])

    @property
    def questions(self) -> int:
        """Turns of human; every one has its answer."""
        return self.prompts.total()

    def as_json(self, tokens: bool = True) -> dict[str, Any]:
        """The counts for a report; tokens None where they were not counted."""
        return {
            "records": self.records,
            "records_with_image": self.with_image,
            "turns": 2 * self.questions,
            "tokens": self.tokens if tokens else None,
            "records_by_questions": {str(count): self.histogram[count] for count in sorted(self.histogram)},
            "questions_by_prompt": dict(sorted(self.prompts.items())),
        }
