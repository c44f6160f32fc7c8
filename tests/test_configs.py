"""Every shipped config: it loads, says what it promises, and its values are the official recipe's; the schema is current."""

import re
from pathlib import Path

import pytest
import yaml

from fastllava.config import LoraConfig, key_names, load_config, same_training
from fastllava.config.reference import keys_page
from fastllava.config.schema import schema_text

CONFIGS = sorted(path for path in (Path(__file__).parents[1] / "configs").glob("*.yaml") if not path.stem.startswith("mix"))
LORA = [path for path in CONFIGS if path.name.startswith("llava15_") and path.stem.endswith("_lora")]
OFFICIAL = [path for path in CONFIGS if path.name.startswith("llava15_") and path not in LORA]
SIZES = ("13b", "7b")


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_the_four_official_configs_are_there() -> None:
    assert [path.stem for path in OFFICIAL] == [f"llava15_{size}_{stage}" for size in SIZES for stage in ("finetune", "pretrain")]


def test_the_four_configs_with_adapters_are_there() -> None:
    stages = ("finetune_lora", "finetune_task_lora")
    assert [path.stem for path in LORA] == [f"llava15_{size}_{stage}" for size in SIZES for stage in stages]


@named(CONFIGS)
def test_loads(path: Path) -> None:
    config = load_config(path)
    assert config.stage in path.stem


@named(CONFIGS)
def test_opens_with_its_promise_and_fits_one_screen(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    opening = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert f"fastllava train configs/{path.name}" in opening or "fastllava demo" in opening


@named(OFFICIAL)
def test_official_config_names_hardware_and_published_time(path: Path) -> None:
    hours = {"7b_pretrain": "3.5", "7b_finetune": "10", "13b_pretrain": "5.5", "13b_finetune": "20"}[path.stem.removeprefix("llava15_")]
    text = path.read_text(encoding="utf-8")
    assert f"the original took {hours} hours on 8 A100" in text
    assert "# Hardware" in text


@named(OFFICIAL)
def test_official_recipe(path: Path) -> None:
    """The values of scripts/v1_5/pretrain.sh and finetune.sh, written out here once more."""
    config = load_config(path)
    pretrain = path.stem.endswith("pretrain")
    assert (config.train.global_batch, config.optim.lr) == ((256, 1e-3) if pretrain else (128, 2e-5))
    assert (config.data.template, config.data.image_policy) == (("plain", "square") if pretrain else ("v1", "pad"))
    assert config.data.group_by_modality is not pretrain
    assert config.train.reference_micro_batch * 8 == config.train.global_batch
    assert config.optim.projector_lr is None
    assert config.optim.max_grad_norm is None
    assert (config.optim.weight_decay, config.optim.warmup_ratio, config.optim.schedule) == (0.0, 0.03, "cosine")
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.999, 1e-8)
    assert (config.train.epochs, config.train.max_steps, config.data.max_tokens) == (1, None, 2048)
    assert (config.train.precision, config.train.loss_norm) == ("bf16", "token")
    assert (config.model.projector_type, config.model.select_layer) == ("mlp2x_gelu", -2)
    size = path.stem.split("_")[1]
    assert str(config.model.llm) == f"lmsys/vicuna-{size}-v1.5"
    assert str(config.model.vision_tower) == "openai/clip-vit-large-patch14-336"


@named(LORA)
def test_official_recipe_with_adapters(path: Path) -> None:
    """The values of scripts/v1_5/finetune_lora.sh and finetune_task_lora.sh; all others are those of stage 2 without adapters."""
    config = load_config(path)
    size, task = path.stem.split("_")[1], "task" in path.stem
    whole = load_config(path.with_name(f"llava15_{size}_finetune.yaml"))
    assert config.lora == LoraConfig(rank=128, alpha=256, dropout=0.05)
    assert (config.optim.lr, config.optim.projector_lr) == (2e-4, 2e-5)
    assert config.optim.model_copy(update={"lr": whole.optim.lr, "projector_lr": None}) == whole.optim
    suits = {key.removeprefix("train."): getattr(whole.train, key.removeprefix("train.")) for key, _ in same_training() if "train." in key}
    assert config.train.model_copy(update=suits) == whole.train
    theirs = {"records": whole.data.records, "images": whole.data.images} if task else {}
    assert config.data.model_copy(update=theirs) == whole.data
    begins = {"llm": whole.model.llm, "projector": whole.model.projector} if task else {}
    assert config.model.model_copy(update=begins) == whole.model
    assert config.output_dir != whole.output_dir
    text = path.read_text(encoding="utf-8")
    assert "# Hardware" in text
    assert task or "# Time       fastllava plan foresees" in text


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_stage_2_starts_from_what_stage_1_leaves(size: str, repo: Path) -> None:
    first, second = (load_config(repo / f"configs/llava15_{size}_{stage}.yaml") for stage in ("pretrain", "finetune"))
    assert second.model.projector == first.output_dir / "mm_projector.safetensors"
    assert second.output_dir != first.output_dir


@named(OFFICIAL)
def test_values_that_the_stage_gives_anyway_are_the_stage_s(path: Path) -> None:
    """A value that a config writes out for the reader is the stage's own, but for what suits the hardware, so it cannot drift."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = load_config(path)
    bare = load_config(
        path,
        [f"{section}={{}}" for section in ("optim", "train")]
        + [f"data={{records: {written['data']['records']}, images: {written['data']['images']}}}"],
    )
    assert whole.optim == bare.optim
    assert whole.data == bare.data
    suits = {key.removeprefix("train."): getattr(bare.train, key.removeprefix("train.")) for key, _ in same_training() if "train." in key}
    assert whole.train.model_copy(update=suits) == bare.train


def test_the_page_of_every_key_is_current(repo: Path) -> None:
    page = (repo / "docs" / "keys.md").read_text(encoding="utf-8")
    assert page == keys_page(), "run make schema"
    listed = re.findall(r"^\| `([\w.]+)`", page, re.MULTILINE)
    assert sorted(listed) == sorted(key_names())
    assert re.findall(r"\|  \|$", page, re.MULTILINE) == [], "a key without a description"


def test_schema_is_current(repo: Path) -> None:
    assert (repo / "configs" / "schema.json").read_text(encoding="utf-8") == schema_text(), "run make schema"
