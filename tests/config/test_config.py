"""Configs: what is merged into what, and every class of mistake as one line that names the key and the remedy."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastllava.config import Config, check_config, key_names, load_config
from fastllava.config.keys import default_values
from fastllava.errors import UserError
from fastllava_kernels import rooms

BASE = """\
stage: pretrain
output_dir: out
model:
  llm: llm
  vision_tower: clip
data:
  records: records.json
  images: images
"""
ROOMS = ", ".join(f"kernels.{name}" for name in rooms())


def load(folder: Path, text: str = BASE, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def complaint(folder: Path, text: str = BASE, *overrides: str) -> str:
    """The message of the UserError, without the folder, which differs from run to run."""
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "a traceback would show the inner exception"
    return str(caught.value).replace(f"{folder}{os.sep}", "")


# What is merged into what.


def test_stage_gives_what_the_file_leaves_out(tmp_path: Path) -> None:
    pretrain, finetune = load(tmp_path), load(tmp_path, BASE, "stage=finetune")
    assert (pretrain.optim.lr, pretrain.train.global_batch, pretrain.data.template) == (1e-3, 256, "plain")
    assert (finetune.optim.lr, finetune.train.global_batch, finetune.data.template) == (2e-5, 128, "v1")


def test_file_beats_stage_and_override_beats_file(tmp_path: Path) -> None:
    text = BASE + "optim:\n  lr: 5e-4\n"
    assert load(tmp_path, text).optim.lr == 5e-4
    assert load(tmp_path, text, "optim.lr=1e-4").optim.lr == 1e-4
    assert load(tmp_path, text, "optim.lr=1e-4", "optim.lr=3e-4").optim.lr == 3e-4, "the last one counts"
    assert load(tmp_path, text, "optim.max_grad_norm=1.0").optim.lr == 5e-4, "its neighbours stay"


def test_section_whose_keys_are_all_commented_out(tmp_path: Path) -> None:
    plain = load(tmp_path)
    assert load(tmp_path, BASE + "optim:\ntrain:\nkernels:\nlog:\n") == plain


@pytest.mark.parametrize(("written", "number"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("1.5e-3", 1.5e-3), (".5", 0.5), ("1.", 1.0), ("2", 2.0)])
def test_numbers_as_people_write_them(tmp_path: Path, written: str, number: float) -> None:
    assert load(tmp_path, BASE + f"optim:\n  lr: {written}\n").optim.lr == number
    assert load(tmp_path, BASE, f"optim.lr={written}").optim.lr == number


def test_underscores_group_digits(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "train.micro_batch_tokens=16_384").train.micro_batch_tokens == 16384


@pytest.mark.parametrize("word", ["null", "~", ""])
def test_null_takes_a_value_away(tmp_path: Path, word: str) -> None:
    assert load(tmp_path, BASE + "optim:\n  max_grad_norm: 1.0\n", f"optim.max_grad_norm={word}").optim.max_grad_norm is None


def test_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "output_dir=runs/lr=1e-3").output_dir == Path("runs/lr=1e-3")


def test_date_like_path_is_a_path(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "output_dir=2024-01-01").output_dir == Path("2024-01-01")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(tmp_path, BASE, "data.images=~/images").data.images == Path("/home/someone/images")


def test_fresh_is_a_word_and_the_rest_are_paths(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "model.projector=fresh").model.projector == "fresh"
    assert load(tmp_path, BASE, "model.projector=a/mm_projector.bin").model.projector == Path("a/mm_projector.bin")


def test_merge_keys_and_anchors(tmp_path: Path) -> None:
    text = BASE + "optim: &usual\n  lr: 1e-4\n  weight_decay: 0.1\n"
    text = text.replace("optim: &usual", "optim:\n  <<: {lr: 5e-4, eps: 1e-6}")
    config = load(tmp_path, text)
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (1e-4, 1e-6, 0.1)


def test_kernels_by_room_or_one_word_for_all(tmp_path: Path) -> None:
    assert load(tmp_path).kernels == dict.fromkeys(rooms(), "auto")
    assert load(tmp_path, BASE, "kernels=reference").kernels == dict.fromkeys(rooms(), "reference")
    mixed = load(tmp_path, BASE, "kernels=reference", "kernels.rope=auto").kernels
    assert mixed == {**dict.fromkeys(rooms(), "reference"), "rope": "auto"}


def test_only_true_and_false_are_truth_values(tmp_path: Path) -> None:
    config = load(tmp_path, BASE, "train.compile=off", "train.fp8=off", "data.shuffle=False", "data.legacy=TRUE", "log.project=no")
    assert (config.train.compile, config.train.fp8, config.data.shuffle, config.data.legacy) == ("off", "off", False, True)
    assert config.log.project == "no"


def test_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).optim.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_dump_and_check_gives_the_same(tmp_path: Path) -> None:
    """run_config.json is written this way and read this way."""
    config = load(tmp_path, BASE, "model.projector=fresh", "log.backends=[tensorboard]", "kernels.rope=reference")
    assert check_config(config.model_dump(mode="json")) == config


def test_keys_are_all_settable(tmp_path: Path) -> None:
    """`keys` names exactly what an override can reach."""
    dumped = load(tmp_path).model_dump()
    expected = set()
    for section, value in dumped.items():
        expected |= {f"{section}.{key}" for key in value} if isinstance(value, dict) and section != "kernels" else {section}
    assert set(key_names()) == expected


# Mistakes. Each line is the whole message: what was given, and what to write instead.

MISTAKES = {
    # unknown keys
    "typo": ("optim.lrr=1", "optim.lrr: no such key; did you mean optim.lr?"),
    "typo of a section": ("optimm.lr=1", "optimm: no such key; did you mean optim?"),
    "without its section": ("lr=1", "lr: no such key; did you mean optim.lr?"),
    "in another section": ("train.lr=1", "train.lr: no such key; did you mean optim.lr?"),
    "flag of the original": ("model_max_length=2048", "model_max_length: no such key; did you mean data.max_tokens?"),
    "flag of the original, in a section": ("optim.learning_rate=1", "optim.learning_rate: no such key; did you mean optim.lr?"),
    "no share": ("eval.held_out=1.5", "eval.held_out: 1.5 is no share of the records; write one between 0 and 1, such as 0.01"),
    "a whole share": ("eval.held_out=1", "eval.held_out: 1 is no share of the records"),
    "a share that is true": ("eval.held_out=true", "eval.held_out: true is no path"),
    "no records to ask": ("eval.samples=0", "eval.samples: 0 is no number of records; write one such as 8, or a file of questions"),
    "half a record": ("eval.samples=0.5", "eval.samples: 0.5 is no number of records"),
    "nothing to evaluate": ("eval.every_steps=10", "eval.every_steps: there is nothing to evaluate; write eval.held_out=0.01, say, or"),
    "others' evaluation": ("evaluation_strategy=steps", "evaluation_strategy: no such key: write eval.held_out and eval.every_steps"),
    "others' steps": ("eval_steps=10", "eval_steps: no such key; did you mean eval.every_steps?"),
    "others' set": ("val_data_path=x.json", "val_data_path: no such key; did you mean eval.held_out?"),
    "others' batch": (
        "per_device_eval_batch_size=4",
        "per_device_eval_batch_size: no such key: leave it out: train.micro",
    ),
    "others' limit": ("eval_max_samples=4", "eval_max_samples: no such key: leave it out: eval.held_out gives"),
    "nothing like it": (
        "foo=1",
        "foo: no such key; write one of stage, output_dir, model, data, lora, optim, train, eval, kernels, parallel, log",
    ),
    "nothing like it, in a section": ("log.foo=1", "log.foo: no such key; write one of log.backends, log.project"),
    "number as a key": ("optim.3=1", "optim.3: no such key; write one of "),
    "number of processes": ("parallel.world=2", "parallel.world: no such key; write one of parallel.frozen, parallel.reshard, "),
    "dashes": ("--optim.lr=1", "--optim: no such key; did you mean optim?"),
    "adapters where the projector alone trains": ("lora.rank=8", "lora.rank: 8, but stage pretrain trains the projector alone; write "),
    "adapters without a rank": ("lora.alpha=8", "lora.alpha: 8.0, but there is no lora.rank; write lora.rank=128, say, or leave lora out"),
    "the original's word for a rank": ("lora_r=8", "lora_r: no such key; did you mean lora.rank?"),
    # wrong types
    "word for a number": ("optim.lr=abc", "optim.lr: 'abc' is no number; write one such as 0.03 or 2e-5"),
    "list for a number": ("optim.lr=[1]", "optim.lr: [1] is no number; write one such as 0.03 or 2e-5"),
    "nothing for a number": ("optim.lr=", "optim.lr: null is no number; write one such as 0.03 or 2e-5"),
    "truth for a number": ("optim.lr=true", "optim.lr: true is no number; write one such as 0.03 or 2e-5"),
    "infinite": ("optim.lr=.inf", "optim.lr: '.inf' is no number; write one such as 0.03 or 2e-5"),
    "not a number": ("optim.lr=nan", "optim.lr: 'nan' is no number; write one such as 0.03 or 2e-5"),
    "time for a number": ("train.checkpoint_minutes=1:30", "train.checkpoint_minutes: '1:30' is no number; write one such as 30"),
    "fraction for a count": ("train.epochs=1.5", "train.epochs: 1.5 is no whole number; write one such as 1"),
    "word for a count": ("train.seed=abc", "train.seed: 'abc' is no whole number; write one such as 42"),
    "leading zero": ("train.seed=010", "train.seed: '010' is no whole number; write one such as 42"),
    "word for a truth": ("data.shuffle=maybe", "data.shuffle: 'maybe' is neither true nor false; write one of them"),
    "number for a truth": ("data.shuffle=1", "data.shuffle: 1 is neither true nor false; write one of them"),
    "yes for a truth": ("data.shuffle=yes", "data.shuffle: 'yes' is neither true nor false; write one of them"),
    "off for a truth": ("train.tf32=off", "train.tf32: 'off' is neither true nor false; write one of them"),
    "number for a word": ("data.template=1", "data.template: 1 is no word; write one, in quotes when it looks like a number"),
    "number for a path": ("output_dir=3", "output_dir: 3 is no path; write one, in quotes when it looks like a number"),
    "list for a path": ("model.projector=[1]", "model.projector: [1] is no path; write one, in quotes when it looks like a number"),
    "empty path": ("model.llm=", "model.llm: is empty; write a path"),
    "path of no characters": ("model.llm=''", "model.llm: is empty; write a path"),
    "NUL in a path": (r'model.llm="a\0b"', r"model.llm: 'a\x00b' is no path; write one, in quotes when it looks like a number"),
    "unknown home": ("model.llm=~nobody-of-this-name/x", "begins with the home of an unknown user; write the whole path"),
    "word for a list": ("log.backends=wandb", "log.backends: 'wandb' is no list; write one such as [wandb]"),
    "value for a section": ("optim=3", "optim: 3 holds no keys; write its keys below it, such as 'lr: VALUE'"),
    "list for a section": ("train=[1]", "train: [1] holds no keys; write its keys below it, such as 'global_batch: VALUE'"),
    "key below a value": ("stage.x=1", "override 'stage.x=1': stage holds 'pretrain' and has no keys of its own; write stage=VALUE"),
    # values that are not allowed
    "literal": ("train.precision=fp16", "train.precision: 'fp16' is not among its values; write 'bf16' or 'fp32'"),
    "literal, nothing": ("stage=", "stage: null is not among its values; write 'pretrain' or 'finetune'"),
    "literal in a list": (
        "log.backends=[wandb, x]",
        "log.backends.1: 'x' is not among its values; write 'tensorboard', 'wandb' or 'trackio'",
    ),
    "projector": (
        "model.projector_type=mlp0x_gelu",
        "model.projector_type: 'mlp0x_gelu' is no projector; write one of linear, mlpNx_gelu, identity, mlp_downsample; "
        "mlp2x_gelu is LLaVA-1.5's",
    ),
    "below": ("optim.lr=-1", "optim.lr: -1 is too small; write a number above 0"),
    "at the edge": ("optim.lr=0", "optim.lr: 0 is too small; write a number above 0"),
    "too few": ("train.global_batch=0", "train.global_batch: 0 is too small; write at least 1"),
    "too many": ("data.max_quarantined_share=1.5", "data.max_quarantined_share: 1.5 is too large; write at most 1"),
    "above": ("optim.beta1=1.0", "optim.beta1: 1.0 is too large; write a number below 1"),
    # rooms
    "unknown room": ("kernels.swiglue=auto", "kernels.swiglue: no such room; did you mean kernels.swiglu?"),
    "no room like it": ("kernels.conv=auto", f"kernels.conv: no such room; write one of {ROOMS}"),
    "implementation": ("kernels.rope=cuda", "kernels.rope: 'cuda' is no implementation of it; write one of auto, "),
    "implementation, a number": ("kernels.rope=3", "kernels.rope: 3 is no word; write one, in quotes when it looks like a number"),
    "rooms as a list": ("kernels=[rope]", "kernels: [rope] is no implementation; write one for all rooms, such as reference"),
    # overrides
    "no equals sign": ("optim.lr", "override 'optim.lr': is not of the form key=value; write for example optim.lr=2e-5"),
    "no key": ("=3", "override '=3': is not of the form key=value; write for example optim.lr=2e-5"),
    "two dots": ("optim..lr=3", "override 'optim..lr=3': is not of the form key=value; write for example optim.lr=2e-5"),
    "override is no YAML": ("optim.lr={", "override 'optim.lr={': is not valid YAML ("),
}


@pytest.mark.parametrize(("override", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake(tmp_path: Path, override: str, expected: str) -> None:
    message = complaint(tmp_path, BASE, override)
    assert expected in message
    assert "\n" not in message


FILES = {
    "no stage": ("output_dir: out\n", "stage: is missing; write it in the config or as stage=pretrain or stage=finetune"),
    "empty file": ("", "stage: is missing; write it in the config or as stage=pretrain or stage=finetune"),
    "missing key": (BASE.replace("  llm: llm\n", ""), "model.llm: is missing; write it in the config or as model.llm=VALUE"),
    "list": ("- stage\n", "config.yaml: holds [stage], not keys; a config holds lines such as 'stage: pretrain'"),
    "scalar": ("pretrain", "config.yaml: holds 'pretrain', not keys; a config holds lines such as 'stage: pretrain'"),
    "key twice": (BASE + "stage: finetune\n", "config.yaml, line 9: is not valid YAML (key 'stage' is given twice)"),
    "key twice in a section": (BASE + "optim:\n  lr: 1\n  lr: 2\n", "config.yaml, line 11: is not valid YAML (key 'lr' is given twice)"),
    "bracket": (BASE + "optim: {lr: 1\n", "config.yaml, line 10: is not valid YAML (expected ',' or '}'"),
    "tab": (BASE + "\toptim: 1\n", "config.yaml, line 9: is not valid YAML (found character '\\t' that cannot start any token)"),
    "two documents": (BASE + "---\nstage: finetune\n", "config.yaml, line 9: is not valid YAML (but found another document)"),
    "mapping as a key": (BASE + "? [a, b]\n: 1\n", "config.yaml, line 9: is not valid YAML (a key must be a word)"),
    "number as a key": (
        BASE + "3: 1\n",
        "3: no such key; write one of stage, output_dir, model, data, lora, optim, train, eval, kernels, parallel, log",
    ),
    "inside itself": (BASE + "log: &a\n  project: *a\n", "config.yaml, line 9: is not valid YAML (found unconstructable recursive node)"),
    "too deep": ("a: " + "[" * 3000, "config.yaml: is nested too deeply; a config is a few levels of keys"),
    "unknown alias": (BASE + "log: *nothing\n", "config.yaml, line 9: is not valid YAML (found undefined alias 'nothing')"),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES.keys())
def test_mistake_in_the_file(tmp_path: Path, text: str, expected: str) -> None:
    message = complaint(tmp_path, text)
    assert expected in message
    assert "\n" not in message


def test_python_objects_are_refused_and_not_made(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    message = complaint(
        tmp_path, BASE + f"log: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]\n"
    )
    assert "config.yaml, line 9: is not valid YAML (could not determine a constructor for the tag" in message
    assert not marker.exists()


def test_every_problem_in_one_go(tmp_path: Path) -> None:
    message = complaint(
        tmp_path, BASE.replace("  llm: llm\n", ""), "optim.lr=x", "train.precision=q", "foo=1", "kernels.rope=a", "kernels.rop=b"
    )
    assert sorted(line.split(":")[0] for line in message.splitlines()) == [
        "foo",
        "kernels.rop",
        "kernels.rope",
        "model.llm",
        "optim.lr",
        "train.precision",
    ]


def test_unknown_implementation_for_all_rooms_names_them(tmp_path: Path) -> None:
    lines = complaint(tmp_path, BASE, "kernels=fast").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"kernels.{name}" for name in rooms()]


def test_micro_batches_of_the_original_must_be_whole(tmp_path: Path) -> None:
    message = complaint(tmp_path, BASE, "train.loss_norm=llava", "train.global_batch=100")
    assert message.startswith("train.reference_micro_batch: 32 does not divide train.global_batch 100")
    assert message.endswith("write a divisor of it")
    assert load(tmp_path, BASE, "train.global_batch=100").train.global_batch == 100, "loss_norm=token does not look at it"


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin1.yaml").write_bytes(b"stage: \xe9\n")
    (tmp_path / "binary.yaml").write_bytes(b"stage: a\x00\n")
    for name, expected in {
        "absent.yaml": "absent.yaml: cannot be read (No such file or directory); give the path of a YAML config",
        ".": ": cannot be read (Is a directory); give the path of a YAML config",
        "latin1.yaml": "latin1.yaml: is not text in UTF-8; give the path of a YAML config",
        "binary.yaml": "binary.yaml: is not valid YAML (unacceptable character #x0000",
    }.items():
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / name)
        assert expected in str(caught.value)


def test_no_value_of_any_kind_in_any_key_gives_a_traceback() -> None:
    """Each key with each kind of value: a Config or a UserError of single lines that name the key."""
    base = {"stage": "pretrain", "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}}
    values = [
        None,
        True,
        0,
        -1,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "word",
        "{gt}",
        "a\nb",
        [],
        [1],
        {},
        {"a": 1},
        {1: 2},
        b"bytes",
        10**30,
    ]
    for key, value in itertools.product(key_names(), values):
        section, _, name = key.rpartition(".")
        given = {**base, key: value} if not section else {**base, section: {**base.get(section, {}), name: value}}
        message = _message(given)
        assert all(line.startswith((key, "stage: ")) for line in message.splitlines()), (key, value, message)


def _message(given: dict) -> str:
    try:
        check_config(given)
    except UserError as error:
        return str(error)
    return ""


def test_a_path_that_the_locale_cannot_write_is_the_files_own_name_in_utf_8(tmp_path, monkeypatch):
    """Under LC_ALL=C with PYTHONUTF8=0 names of files are ASCII to Python."""
    import os

    from fastllava.config.section import as_path

    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    assert str(as_path("/a/\u00fc")).encode("utf-8", "surrogateescape") == "/a/\u00fc".encode()


HUGE = "x" * 100_000


@pytest.mark.parametrize(
    "word", [HUGE, f"{HUGE}=1", f"optim.{HUGE}=1", f"kernels.{HUGE}=auto", f"optim.lr={HUGE}", f"optim.lr=!!{HUGE}", f"optim.lr=*{HUGE}",
             f"train.seed={'9' * 9000}", f"stage.{HUGE}=1"],
    ids=lambda word: f"{word[:12]} of {len(word)}",
)  # fmt: skip
def test_no_message_copies_a_huge_value(word, tmp_path):
    with pytest.raises(UserError) as told:
        load(tmp_path, BASE, word)
    assert len(str(told.value)) < 700


@pytest.mark.parametrize("key", [key for key, value in default_values() if isinstance(value, int | float) and not isinstance(value, bool)])
def test_the_number_that_a_message_proposes_is_taken(key, tmp_path):
    with pytest.raises(UserError, match=rf"{re.escape(key)}: 'no' is no (whole )?number; write one such as ") as told:
        load(tmp_path, BASE, f"{key}='no'")
    proposed = str(told.value).rpartition("such as ")[2]
    load(tmp_path, BASE, f"{key}={proposed}")


def test_a_config_is_checked_and_its_schema_and_toggles_written_without_torch() -> None:
    """Importing torch takes seconds, which nobody waits for to read about a typing mistake."""
    code = """
import sys
from fastllava.config import check_config
from fastllava.config.schema import schema_text
from fastllava.config.toggles import levers, train_toggles
from fastllava.errors import UserError
base = {"stage": "pretrain", "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}}
check_config(base | {"kernels": {"attention": "varlen"}})
try:
    check_config(base | {"kernels": {"attention": "none"}})
except UserError as error:
    print(error)
assert schema_text() and [*levers()] and [*train_toggles()]
print(sorted({"torch", "triton"} & sys.modules.keys()))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    names = ", ".join(["auto", *rooms()["attention"].implementations])
    assert said == [f"kernels.attention: 'none' is no implementation of it; write one of {names}", "[]"]
