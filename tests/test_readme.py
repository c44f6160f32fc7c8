"""README and docs: their commands run, in a small world laid out at the very paths they name, and what they say of files and keys is so."""

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import typer
from PIL import Image
from torch.distributed.run import get_args_parser
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from benches import cli as bench
from fastllava import cli
from fastllava.config import key_names, load_config
from fastllava.data.tokenizer import Tokenizer
from fastllava.train.metrics.log import read_metrics
from fastllava_kernels import rooms

REPO = Path(__file__).resolve().parents[1]
# In the order in which a newcomer reads them.
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), REPO / "CONTRIBUTING.md"]
TEXTS = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def commands(text: str) -> list[str]:
    """The lines of a page's bash blocks."""
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line.strip()]


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))

# Not run here, and why. Those of fastllava are still held to what its command line takes.
ELSEWHERE = {
    "make demo": "minutes; tests/demo runs the demo, tests/test_house.py what make does",
    "make test": "is what runs this",
    "make check": "minutes; .ci/run runs it",
    "make dev": "has been done where this runs; tests/test_house.py tries what make does",
    ".venv/bin/pre-commit install": "changes the clone's git hooks",
    "make install": "has been done where this runs; tests/test_house.py tries what make does",
    "python -m pip install --no-index --find-links wheels -e '.[test]'": "is for another machine; tests/benches/test_kit.py",
    "source .venv/bin/activate": "sets variables of the reader's shell",
}
ELSEWHERE_BEGINNING = {
    "hf download ": "gigabytes; test_downloads_arrive_where_the_configs_look checks where they go",
    "unzip ": "gigabytes; test_downloads_arrive_where_the_configs_look checks where they go",
    "fastllava chat ": "talks with a person; tests/evaluate/test_chat.py does",
    "fastllava score llava_bench ": "asks a judge; tests/evaluate/test_judge_openai.py has one",
    "fastllava score mm_vet ": "needs a judge's replies; tests/evaluate/benchmarks/test_mm_vet.py has some",
    "fastllava mix ": "gigabytes of annotation files; tests/mix builds mixes of small ones",
    "fastllava bench ": "minutes, and a GPU for one of them; tests/benches runs the benches",
}
PLANS_A_REAL_SIZE = " --size "
"""A plan of a real size takes most of a minute; tests/planner runs smaller ones."""


def reason_not_to_run(command: str) -> str | None:
    """Why a command of the pages is not run by these tests, or None."""
    if PLANS_A_REAL_SIZE in command:
        return "most of a minute; tests/planner plans smaller models"
    return ELSEWHERE.get(command) or next((why for start, why in ELSEWHERE_BEGINNING.items() if command.startswith(start)), None)


def words_of_fastllava(command: str) -> list[str] | None:
    """The words after `fastllava` of a command, alone or under torchrun; None for other programs."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        at = words.index("fastllava")
        given = get_args_parser().parse_args([*words[1:at], "fastllava"])
        assert given.no_python, f"{command}: fastllava is a console script, so torchrun needs --no-python"
        words = words[at:]
    return words[1:] if Path(words[0]).name == "fastllava" else None


def test_every_command_is_run_or_said_to_be_run_elsewhere() -> None:
    run = [command for command in COMMANDS if reason_not_to_run(command) is None]
    assert [command for command in run if words_of_fastllava(command) is None] == []
    assert [command for command in ELSEWHERE if command not in COMMANDS] == []
    assert len(run) >= 10
    for name in ("train", "prepare", "config", "plan", "certify", "inspect", "export", "toggles"):
        assert any(f"fastllava {name}" in command for command in run), name


def test_commands_that_are_not_run_are_ones_that_the_command_line_takes() -> None:
    for command in COMMANDS:
        words = words_of_fastllava(command)
        if words is None or reason_not_to_run(command) is None:
            continue
        # `fastllava bench` hands its words to the program of the benches.
        group, words = (typer.main.get_command(bench.app), words[1:]) if words[0] == "bench" else (typer.main.get_command(cli.app), words)
        while isinstance(group, typer.core.TyperGroup):
            name, group, words = group.resolve_command(typer.Context(group), words)
        assert group is not None, command
        group.make_context(name, words)


def test_the_page_of_benchmarks_has_every_bench() -> None:
    group = typer.main.get_command(bench.app)
    assert isinstance(group, typer.core.TyperGroup)
    shown = {name for name, command in group.commands.items() if not command.hidden}
    assert set(re.findall(r"^\| `fastllava bench (\w+)", TEXTS["docs/benchmarks.md"], re.MULTILINE)) == shown


def test_downloads_arrive_where_the_configs_look() -> None:
    first, second = (load_config(REPO / "configs" / f"llava15_7b_{stage}.yaml") for stage in ("pretrain", "finetune"))
    arrived = set()
    for words in (shlex.split(command) for command in COMMANDS if command.startswith("hf download ")):
        folder, (name, *files) = (
            Path(words[words.index("--local-dir") + 1]),
            words[2 : words.index(next(w for w in words if w[:2] == "--"))],
        )
        if "dataset" not in words:
            assert str(folder) == name, "the configs call a model by the name of its hub"
        arrived |= {folder, *(folder / file for file in files)}
    assert {first.model.llm, first.model.vision_tower, first.data.records, second.data.records} <= arrived
    (unzip,) = (shlex.split(command) for command in COMMANDS if command.startswith("unzip "))
    assert Path(unzip[2]) in arrived
    assert Path(unzip[unzip.index("-d") + 1]) == first.data.images
    folders = re.findall(r"^\|.*GB \| `([\w/]+)` \|", TEXTS["docs/downloads.md"], re.MULTILINE)
    assert {Path(folder).parent for folder in folders} == {second.data.images}
    assert sorted(Path(folder).name for folder in folders) == ["coco", "gqa", "ocr_vqa", "textvqa", "vg"]


def conversation(i: int, question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"{answer} {i}."}]


def lay_out(root: Path) -> None:
    """Stand-ins for the real models and data, at the paths of README and configs: an LLM 32 wide, a tower of 28 pixels, 12 records."""
    data = root / "playground" / "data"
    captions, chats = [], []
    for folder in (data / "LLaVA-Pretrain" / "images", data / "coco" / "train2017"):
        folder.mkdir(parents=True)
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / "LLaVA-Pretrain" / "images" / f"{i}.png")
        Image.fromarray(pixels).save(data / "coco" / "train2017" / f"{i}.png")
        captions.append({"id": str(i), "image": f"{i}.png", "conversations": conversation(i, "<image>\nDescribe it.", "noise of width")})
        chat = {"id": str(i), "conversations": conversation(i, "Say a number.", "it is")}
        if i % 3:
            chat |= {"image": f"coco/train2017/{i}.png", "conversations": conversation(i, "<image>\nWhat is it?", "noise")}
        chats.append(chat)
    (data / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    (data / "llava_v1_5_mix665k.json").write_text(json.dumps(chats))

    (root / "my_task.json").write_text(json.dumps(chats))
    (root / "my_images").symlink_to(data)

    (root / "images").mkdir()
    shutil.copyfile(data / "coco" / "train2017" / "1.png", root / "images" / "1.png")
    (root / "questions.jsonl").write_text(json.dumps({"question_id": 1, "image": "1.png", "text": "What is it?"}) + "\n")

    pope = data / "eval" / "pope"
    (pope / "val2014").mkdir(parents=True)
    (pope / "coco").mkdir()
    shutil.copyfile(data / "coco" / "train2017" / "1.png", pope / "val2014" / "1.png")
    asked = [
        {"question_id": i, "image": "1.png", "text": "Is it noise?", "category": name} for i, name in enumerate(("random", "adversarial"))
    ]
    (pope / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    for row in asked:
        label = {"question_id": 1, "image": "1.png", "text": "Is it noise?", "label": "yes"}
        (pope / "coco" / f"coco_pope_{row['category']}.json").write_text(json.dumps(label) + "\n")

    llm = root / "lmsys" / "vicuna-7b-v1.5"
    llm.mkdir(parents=True)
    corpus = [turn["value"] for record in captions + chats for turn in record["conversations"]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(llm / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # as Llama's
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (llm / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(llm / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_hidden_layers=2, **small)).save_pretrained(llm)
    clip = CLIPVisionConfig(num_hidden_layers=3, image_size=28, patch_size=14, **small)
    CLIPVisionModel(clip).save_pretrained(root / "openai" / "clip-vit-large-patch14-336")


def fastllava(*words: str) -> tuple[int, str]:
    """The exit code of the console script with these words, and what it printed."""
    printed = io.StringIO()
    before = sys.argv
    sys.argv = ["fastllava", *words]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            cli.main()
        code: object = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return (code if isinstance(code, int) else 1), printed.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of someone who did what README says, with small models and data."""
    root = tmp_path_factory.mktemp("readme")
    lay_out(root)
    shutil.copytree(REPO / "configs", root / "configs")
    return root


@pytest.fixture
def within(world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(world)
    return fastllava


def test_commands_run_in_order(within: Callable[..., tuple[int, str]], world: Path) -> None:
    for command in COMMANDS:
        if reason_not_to_run(command) is not None:
            continue
        words = words_of_fastllava(command)
        assert words is not None, command
        code, printed = within(*words)
        assert code == 0, f"{command}\n{printed}"
        assert printed.strip(), command

    first, second = world / "runs" / "llava15-7b-pretrain", world / "runs" / "llava15-7b-finetune"
    for name in ("mm_projector.safetensors", "mm_projector.bin", "metrics.jsonl", "loss.png", "run_summary.json", "run_config.json"):
        assert (first / name).is_file(), name
        assert (second / name).is_file(), name
    for folder in (second, world / "runs" / "llava15-7b-hf", world / "runs" / "llava15-7b-llava"):
        assert (folder / "config.json").is_file(), folder
        assert list(folder.glob("model*.safetensors")), folder

    said = re.search(r"A line of `metrics.jsonl` holds (.*?)\.\n", TEXTS["docs/what-a-run-leaves.md"], re.DOTALL)
    assert said is not None
    row = read_metrics(second)[0]
    assert set(re.findall(r"`(\w+)`", said[1])) == row.keys() | {"mfu", "hfu", "peak_memory_bytes"}


def test_worked_example(within: Callable[..., tuple[int, str]], world: Path) -> None:
    """The record of docs/bad-records.md, its rendering and the mask under it, read from the page itself."""
    page = TEXTS["docs/bad-records.md"]
    record = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    rendered = re.search(r"```text\n(.*)\n( *)(\^+)\n```", page)
    assert record is not None
    assert rendered is not None
    (world / "example.jsonl").write_text(json.dumps(json.loads(record[1])) + "\n")
    words = ("example.jsonl", "--tokenizer", "lmsys/vicuna-7b-v1.5", "--template", "v1", "--format", "jsonl")
    code, printed = within("inspect", *words)
    assert code == 0, printed
    row = json.loads(printed)
    tokenizer = Tokenizer.load(world / "lmsys" / "vicuna-7b-v1.5")
    ids, ((start, end),) = row["input_ids"], row["supervised"]
    text, under = rendered[1].replace("\\n", "\n"), len(rendered[2]) - 1  # one character less: the \n
    assert tokenizer.decode(ids[start:end]).strip() + "</s>" == text[under:]
    assert len(rendered[3]) == len(text[under:])
    assert ids[end - 1] == tokenizer.eos_id
    assert ids[0] == tokenizer.bos_id
    where = ids.index(-200)
    opening, closing = text.removeprefix("<s>").split("<image>")
    assert tokenizer.decode(ids[:where]).startswith(opening.split(" ... ")[0])
    assert tokenizer.decode(ids[:where]).strip().endswith(opening.split(" ... ")[1].strip())
    assert tokenizer.decode(ids[where + 1 :]).strip() == closing.strip().removesuffix("</s>")


def test_the_files_they_name_exist() -> None:
    everything = "\n".join([*TEXTS.values(), (REPO / "kernels" / "README.md").read_text(encoding="utf-8")])
    named = set(re.findall(r"`((?:fastllava|tests|configs|kernels|benches|docs)/[\w./-]+)`", everything))
    assert [name for name in sorted(named) if not (REPO / name).exists()] == []
    assert len(named) > 30


def test_the_config_keys_they_name_exist() -> None:
    known = set(key_names()) | {f"kernels.{name}" for name in rooms()}
    for name, text in {**TEXTS, "CHANGELOG.md": (REPO / "CHANGELOG.md").read_text(encoding="utf-8")}.items():
        named = set(re.findall(r"\b((?:model|data|optim|train|log|parallel)\.[a-z]\w+)\b(?!\.\w)", text)) - {"model.safetensors"}
        assert named <= known, name
        assert named or name not in ("README.md", "docs/config.md")


def test_the_kernels_readme_lists_every_room() -> None:
    text = (REPO / "kernels" / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Rooms") : text.index("## Lab book")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(rooms())
