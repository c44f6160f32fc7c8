"""What a source gets to work with: its files as checked rows, its draws, room on the disk, and where it says what it leaves out."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from fastllava.data.tokenizer import Tokenizer
from fastllava.mix.conversation import BadRow
from fastllava.mix.draw import Draw
from fastllava.mix.reasons import BAD, REASONS
from fastllava.mix.rows import Advance, Row, read_json, read_table
from fastllava.mix.shelf import Groups, Table

T = TypeVar("T")


class Dropped:
    """What a source has left out: every bad annotation by name in dropped.jsonl, the others counted."""

    def __init__(self, source: str, file: TextIO) -> None:
        self._source, self._file = source, file
        self.reasons: Counter[str] = Counter()
        self.first = ""
        """The first bad one, for a person."""

    def bad(self, reason: str, where: str, detail: str) -> None:
        """Notes an annotation or a record that cannot be used."""
        assert reason in BAD, reason  # noqa: S101
        self.reasons[reason] += 1
        self.first = self.first or f"{where}: {detail}"
        self._file.write(json.dumps({"source": self._source, "reason": reason, "where": where, "detail": detail}) + "\n")

    def by_rule(self, reason: str, count: int = 1) -> None:
        """Counts what a rule leaves out."""
        assert reason in REASONS, reason  # noqa: S101
        if count:
            self.reasons[reason] += count

    @property
    def n_bad(self) -> int:
        """How many were bad."""
        return sum(count for reason, count in self.reasons.items() if reason in BAD)


class Run:
    """One source at work. `close` lets go of what lies on the disk."""

    def __init__(
        self,
        name: str,
        draw: Draw,
        scratch: Path,
        dropped: Dropped,
        advance: Advance,
        images: Path | None,
        tokenizer: Tokenizer | None,
        max_images: int = 1,
    ) -> None:
        """`images` is the folder that pictures are saved in; `max_images` how many a record may show."""
        self.name, self.draw, self.dropped, self.images, self.tokenizer = name, draw, dropped, images, tokenizer
        self.max_images = max_images
        self._scratch, self._advance = scratch, advance
        self._kept: list[Groups | Table] = []
        self.read = 0
        """Annotations read so far."""

    def json(self, path: Path, convert: Callable[[Row], T], under: str | None = None) -> Iterator[T]:
        """What `convert` makes of each row of a JSON file (`read_json`); rows for which it raises BadRow are dropped by name."""
        return self.converted(read_json(path, self._advance, under), convert)

    def table(self, paths: Iterable[Path], convert: Callable[[Row], T], under: str | None = None) -> Iterator[T]:
        """The same for files of any form, one after the other (`read_table`)."""
        for path in paths:
            yield from self.converted(read_table(path, self._advance, under), convert)

    def converted(self, rows: Iterable[Row], convert: Callable[[Row], T]) -> Iterator[T]:
        """What `convert` makes of each row; those for which it raises BadRow are dropped by name."""
        for row in rows:
            self.read += 1
            try:
                if row.problem is not None:
                    raise BadRow("columns" if row.problem.reason == "columns" else "json", row.problem.detail)
                found = convert(row)
            except BadRow as problem:
                self.dropped.bad(problem.reason, row.where, problem.detail)
            else:
                yield found

    @property
    def advance(self) -> Advance:
        """Gets the bytes that were read, for the progress bar."""
        return self._advance

    def groups(self) -> Groups:
        """Groups that are kept on the disk until the source is done."""
        return self._keep(Groups(self._scratch / f"groups{len(self._kept)}"))

    def lookup(self) -> Table:
        """A table that is kept on the disk until the source is done."""
        return self._keep(Table(self._scratch / f"table{len(self._kept)}"))

    def close(self) -> None:
        """Frees the disk."""
        for kept in self._kept:
            kept.close()

    def _keep(self, kept: Any) -> Any:
        self._kept.append(kept)
        return kept
