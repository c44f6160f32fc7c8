"""What of a run's config differs from the official recipe, and what that changes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from made_runs import Made

from fastllava.config import as_written, load_config
from fastllava.evaluate.report.recipe import differences, notices, recipe_of
from fastllava.evaluate.report.run import read_run

RECIPE = "llava15_7b_finetune"


def effects(*overrides: str) -> dict[str, str]:
    written = as_written(load_config(RECIPE, overrides))
    return {one.key: one.effect for one in differences(written, RECIPE)}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_shipped_config_itself_differs_in_nothing(stage: str, size: str) -> None:
    name = f"llava15_{size}_{stage}"
    assert differences(as_written(load_config(name)), name) == []


@pytest.mark.parametrize(
    ("override", "effect"),
    [
        ("optim.lr=3e-5", "training"),
        ("train.loss_norm=llava", "training"),
        ("data.image_policy=square", "training"),
        ("data.max_tokens=1024", "training"),
        ("train.seed=1", "training"),
        ("optim.state=8bit", "lever"),
        ("optim.master=bf16", "lever"),
        ("model.llm=elsewhere/llama", "inputs"),
        ("data.records=mine.json", "inputs"),
        ("eval.held_out=0.01", "inputs"),
        ("eval.held_out=mine.json", "nothing"),
        ("train.micro_batch_tokens=4096", "rounding"),
        ("train.compile=layer", "rounding"),
        ("kernels.rope=reference", "rounding"),
        ("output_dir=elsewhere", "nothing"),
        ("data.workers=7", "nothing"),
        ("train.checkpoint_steps=10", "nothing"),
    ],
)
def test_what_a_difference_changes(override: str, effect: str) -> None:
    assert effects(override) == {override.partition("=")[0]: effect}


def test_the_same_model_and_records_in_another_folder_are_no_difference() -> None:
    assert effects("model.llm=/models/vicuna-7b-v1.5", "data.records=/data/llava_v1_5_mix665k.json") == {}


def test_the_weightiest_stand_first_with_both_values() -> None:
    found = differences(as_written(load_config(RECIPE, ["output_dir=x", "train.tf32=true", "optim.lr=3e-5"])), RECIPE)
    assert [(one.key, one.here, one.recipe) for one in found][:2] == [("optim.lr", "3.0e-05", "2.0e-05"), ("train.tf32", "true", "false")]


def test_keys_of_another_version_are_left_out() -> None:
    written = as_written(load_config(RECIPE))
    written["train"]["invented"] = 1
    del written["optim"]["eps"]
    assert differences(written, RECIPE) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "llava15_7b_finetune"),
        ({"stage": "pretrain"}, "llava15_7b_pretrain"),
        ({"stage": 3}, None),
        ({"model": {"llm": "models/Vicuna-13B"}}, "llava15_13b_finetune"),
        ({"model": "broken"}, "llava15_7b_finetune"),
        ({"lora": {"rank": 4}, "model": {"llm": "x", "projector": "p"}}, "llava15_7b_finetune_lora"),
        ({"lora": {"rank": None}}, "llava15_7b_finetune"),
        ({"lora": "broken"}, "llava15_7b_finetune"),
        ({"lora": {"rank": 4}, "model": {"llm": "models/llava-v1.5-13b"}}, "llava15_13b_finetune_task_lora"),
    ],
)
def test_which_recipe_it_is_compared_with(run_made_once: Made, changes: dict[str, Any], name: str | None) -> None:
    run = read_run(run_made_once.folder)
    assert recipe_of(replace(run, written={**run.written, **changes})) == name


def test_the_page_begins_with_what_makes_it_another_training(make_run: Callable[[], Made]) -> None:
    run = read_run(make_run().folder)
    words = "Not the official recipe (llava15_7b_finetune): optim.lr, train.global_batch, train.max_steps differ."
    assert [one.text for one in notices(run)] == [words]
    same = replace(run, written=as_written(load_config(RECIPE, ["train.tf32=true"])))
    assert "The training is that of the official recipe" in notices(same)[0].text
