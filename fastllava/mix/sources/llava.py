"""Records that are LLaVA's already, such as LLaVA-Instruct: checked, and passed on with all their keys."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from fastllava.data.checks import BadRecord, check_record
from fastllava.mix import fields
from fastllava.mix.conversation import BadRow
from fastllava.mix.keys import FileList, Section, SourceKeys
from fastllava.mix.rows import Row
from fastllava.mix.run import Run
from fastllava.mix.sources.tables import too_many


class Files(Section):
    """What is read."""

    records: FileList = Field(description="LLaVA JSON such as llava_instruct_150k.json, or one record a line; or a list of such files")


class Keys(SourceKeys):
    """LLaVA-Instruct, or records of one's own."""

    format: Literal["llava"]
    files: Files


def read(keys: Keys, run: Run) -> Iterator[dict[str, Any]]:
    """The records in the order of the files; the source's folder goes before their images."""

    def record(row: Row) -> dict[str, Any]:
        found = dict(fields.an_object(row.value))
        try:
            checked = check_record(found, int(row.key), run.max_images)
        except BadRecord as problem:
            if problem.reason == "max_images":
                raise too_many(len(found["image"]), run) from None
            raise BadRow("not_a_record", f"{problem.detail} ({problem.reason})") from None
        if checked.images:
            paths = [f"{keys.images}/{path}" if keys.images else path for path in checked.images]
            found["image"] = paths if len(paths) > 1 else paths[0]
        return found

    return run.table(keys.files.records, record)
