"""Messages name what there is: every command, option, config key and value that a string of the package tells a user to write."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.distributed.run import get_args_parser

from benches import cli as bench
from fastllava import cli
from fastllava.config import key_names, load_config
from fastllava.errors import UserError
from fastllava_kernels import rooms

REPO = Path(__file__).resolve().parents[1]
GAP = "\0"
"""Stands for what an f-string puts in."""

PROSE = {"reads", "or", "certificate"}
"""Words that follow the name of the program where it is no command but the subject of a sentence."""
OTHERS_OPTIONS = {
    "--shm-size": "docker run",
    "--local-dir": "hf download",
    "--layers": "fastllava bench step, which takes its sizes from the planner",
    "--porcelain": "git status",
    "--untracked-files": "git status",
    "--dump-resource-usage": "cuobjdump",
}
NO_KEYS = {"model.encode", "model.language_model", "model.safetensors", "kernels.md", "eval.zip", "data.html"}
"""Names of code, files and others' weights that look like keys."""
OF_THE_READER = {"model.projector=OUTPUT_DIR_OF_PRETRAIN"}
"""Values that stand for one of the reader's."""
SECTIONS = "|".join(sorted({name.partition(".")[0] for name in key_names() if "." in name} | {"kernels"}))


def strings_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each string that the program can print: docstrings and the words beside a field are none."""
    tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    seen = {id(node.value) for node in tree if isinstance(node, ast.Expr)}
    for node in tree:
        if isinstance(node, ast.JoinedStr):
            seen |= {id(part) for part in node.values}
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    for node in tree:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in seen:
            yield node.lineno, node.value


FILES = [path for top in ("fastllava", "kernels") for path in sorted((REPO / top).rglob("*.py"))]
STRINGS = [(f"{path.relative_to(REPO).as_posix()}:{line}", text) for path in FILES for line, text in strings_of(path)]
TEXTS = [text for _, text in STRINGS]


def options_of(app: typer.Typer) -> dict[str, set[str]]:
    """The options of every command of a command line."""
    group: Any = typer.main.get_command(app)
    shared = {option for parameter in group.params for option in parameter.opts}
    return {name: shared | {option for each in command.params for option in each.opts} for name, command in group.commands.items()}


OPTIONS = options_of(cli.app)
BENCHES = options_of(bench.app)
TORCHRUN = {option for action in get_args_parser()._actions for option in action.option_strings}


def unknown_words(text: str) -> list[str]:
    """The commands and options in a text that there are not. An option is one of the program named last before it, else of any command."""
    wrong, allowed = [], set().union(*OPTIONS.values(), OTHERS_OPTIONS)
    for found in re.finditer(
        r"\bfastllava bench (?P<bench>[a-z]\w*)|\bfastllava (?P<ours>[a-z]\w*)|(?P<torchrun>\btorchrun\b)|(?<![\w-])--[a-z][a-z-]*", text
    ):
        word = found[0]
        if found["bench"] or found["ours"]:
            commands, name = (BENCHES, found["bench"]) if found["bench"] else (OPTIONS, found["ours"])
            if name in commands:
                allowed = commands[name] | set(OTHERS_OPTIONS)
            elif name not in PROSE:
                wrong.append(word)
        elif found["torchrun"]:
            allowed = TORCHRUN
        elif word not in allowed:
            wrong.append(word)
    return wrong


def keys_of(text: str) -> set[str]:
    """What looks like a config key in a section, but not a file or a longer name."""
    return set(re.findall(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z]\w*)\b(?![.{GAP}]\w|{GAP})", text))


def settings_of(text: str) -> set[str]:
    """What looks like `key=value` of a config."""
    return set(re.findall(rf"(?<![\w./-])((?:(?:{SECTIONS})\.[a-z]\w*|stage)=[\w+-]+(?:\.\w+)*)(?![\w{GAP}])", text))


def own_options(path: str) -> set[str]:
    """The options of a program that a module is by itself."""
    return set(re.findall(r'add_argument\("(--[a-z-]+)"', (REPO / path).read_text(encoding="utf-8")))


def test_commands_and_options_that_messages_name_are_there() -> None:
    found = [(place, word) for place, text in STRINGS for word in unknown_words(text)]
    assert [(place, word) for place, word in found if word not in own_options(place.partition(":")[0])] == []
    everything = " ".join(TEXTS)
    assert [word for word in (*PROSE, *OTHERS_OPTIONS) if word not in everything] == []


def test_config_keys_that_messages_name_are_there() -> None:
    known = set(key_names()) | {f"kernels.{name}" for name in rooms()} | NO_KEYS
    assert [(place, wrong) for place, text in STRINGS if (wrong := keys_of(text) - known)] == []
    assert set().union(*map(keys_of, TEXTS)) >= NO_KEYS


def test_values_that_messages_name_are_taken() -> None:
    named = set().union(*map(settings_of, TEXTS)) - OF_THE_READER
    assert len(named) > 20
    refused = {}
    for setting in sorted(named):
        try:
            # Adapters, and what lies under them, are no matter for stage pretrain.
            stage = "finetune" if setting.startswith("lora.") else "finetune_lora" if setting.startswith("model.quantize") else "pretrain"
            load_config(REPO / "configs" / f"llava15_7b_{stage}.yaml", [setting])
        except UserError as error:
            refused[setting] = str(error)
    assert refused == {}


@pytest.mark.parametrize(
    "text",
    [
        "write fastllava trains CONFIG",
        "fastllava export --lay hf",
        "fastllava plan CONFIG --layout hf",
        "fastllava bench steps",
        "--outt: x",
        "torchrun --nproc-per-gpu 2",
    ],
)
def test_a_word_that_is_not_there_is_found(text: str) -> None:
    assert unknown_words(text)


def test_keys_and_settings_are_found() -> None:
    assert keys_of("data.recods: no such file; give data.records") == {"data.recods", "data.records"}
    assert keys_of(f"kernels.{GAP}: write kernels.OP=liger, see /model.py and data.{GAP}") == set()
    assert settings_of("write train.recompute=ful, optim.lr=2e-5 or stage=pretrain.") == {
        "train.recompute=ful",
        "optim.lr=2e-5",
        "stage=pretrain",
    }
