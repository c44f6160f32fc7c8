"""`fastllava inspect`: one object a record for programs, readable text for people."""

from collections.abc import Callable

import pytest
from rich.console import Console

from fastllava.batch import IMAGE_ID
from fastllava.config import DataConfig
from fastllava.data.inspect import inspect_records, render_text
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError

MakeData = Callable[..., DataConfig]
RECORDS = [
    {
        "id": "bus",
        "image": "nowhere.jpg",
        "conversations": [{"from": "human", "value": "What colour?\n<image>"}, {"from": "gpt", "value": "Red [b]\x1b[2J"}],
    },
    {"id": 7, "conversations": [{"from": "human", "value": "Hi"}]},
]


def test_objects(make_data: MakeData, tokenizer: Tokenizer) -> None:
    good, bad = inspect_records(make_data(RECORDS).records, tokenizer, "mistral_instruct")
    assert set(good) == {"id", "input_ids", "supervised"}
    assert good["id"] == "bus"
    assert good["input_ids"].count(IMAGE_ID) == 1
    ((begin, end),) = good["supervised"]
    assert end == len(good["input_ids"])
    assert tokenizer.decode(good["input_ids"][begin:end]) == "Red [b]\x1b[2J "
    assert bad == {"id": 7, "quarantined": "no_answer"}


def test_text(make_data: MakeData, tokenizer: Tokenizer) -> None:
    console = Console(width=2000, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for block in render_text(make_data(RECORDS).records, tokenizer, "mistral_instruct"):
        console.print(block)
    shown = console.export_text()
    assert "record 0, line 1, id bus" in shown
    assert "human: 'What colour?\\n<image>'" in shown
    assert "becomes: [INST] <image>\\nWhat colour? [/INST] Red [b]\\x1b[2J </s>" in shown
    assert "tokens: <s> ▁[" in shown
    assert "[</s>] (" in shown
    assert "record 1, line 1, id 7" in shown
    assert "quarantined: no_answer: has no answer of gpt; give it one or take the record out" in shown
    assert "\x1b[2J" not in shown


def test_an_unknown_template_is_said(make_data: MakeData, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.template: no template 'x'"):
        list(inspect_records(make_data(RECORDS).records, tokenizer, "x"))
