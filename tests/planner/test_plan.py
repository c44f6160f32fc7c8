"""A stage's plan: what it looks at, what it picks, and what its figures add up to."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from fastllava.cli import plan_command
from fastllava.config import Config, check_config
from fastllava.data.plan import SampleLengths
from fastllava.errors import UserError
from fastllava.planner.gpus import GPUS, Gpu, gpu_named
from fastllava.planner.plan import Candidate, StagePlan, plan_stage
from fastllava.planner.report import as_json, lines
from fastllava.train.metrics.flops import PEAK_FLOPS

LLAMA = {
    "model_type": "llama", "vocab_size": 600, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


LENGTHS = SampleLengths(np.full(96, 500, np.int32), np.full(96, 50, np.int32), np.ones(96, np.int8), np.full(96, 300, np.int32))


def tiny_gpu(mib: float) -> Gpu:
    """A GPU whose memory has `mib` for tensors."""
    return Gpu("tiny", 1e12, mib * 2**20 / 0.95 + 1.5 * 2**30, 1e12, 9, 1e11)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for folder, values in (("llm", LLAMA), ("clip", CLIP)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(values))
    model = {"llm": str(tmp_path / "llm"), "vision_tower": str(tmp_path / "clip"), "projector": "fresh"}
    train = {"global_batch": 32, "reference_micro_batch": 16}
    return check_config({"stage": "finetune", "output_dir": "o", "model": model, "data": {"records": "r"}, "train": train})


def best_of(found: StagePlan) -> Candidate:
    assert found.chosen is not None
    return found.chosen


def room(found: StagePlan) -> dict[tuple[str, int], int]:
    return {(c.recompute, c.micro_batch_tokens): c.cost.peak for c in found.candidates}


def test_with_room_for_all_nothing_is_computed_again(config: Config) -> None:
    found = plan_stage(config, LENGTHS, GPUS["h200"], 1)
    assert room(found).keys() == {("none", 32768)}
    best = best_of(found)
    assert best is found.candidates[0]
    assert found.plan.n_steps == 3
    assert found.gpu_hours == found.hours == 3 * best.seconds.step / 3600
    assert found.parameters["trained"] * 4 == best.cost.memory["master weights"]
    # 16,000 rows a step are one micro-batch; two GPUs halve it.
    assert best.packed.micro_batches == 1
    assert best_of(plan_stage(config, LENGTHS, GPUS["h200"], 2)).seconds.products == pytest.approx(best.seconds.products / 2)


def test_less_room_takes_smaller_micro_batches_or_recompute_whichever_is_faster(config: Config) -> None:
    roomy = plan_stage(config, LENGTHS, GPUS["h200"], 1).candidates[0]
    found = plan_stage(config, LENGTHS, tiny_gpu(0.5 * roomy.cost.peak / 2**20), 1)
    peaks, fits = room(found), [c for c in found.candidates if c.fits(found.gpu)]
    assert peaks["none", 32768] == roomy.cost.peak
    assert found.chosen is min(fits, key=lambda c: c.seconds.step)
    assert len({recompute for recompute, _ in peaks}) > 1
    # For each policy down to the first that fits, and no further.
    for recompute in {recompute for recompute, _ in peaks}:
        tried = sorted((rows for policy, rows in peaks if policy == recompute), reverse=True)
        assert all(peaks[recompute, rows] > found.gpu.usable for rows in tried[:-1])
    faster_with_room = min(c.seconds.step for c in found.candidates) < 0.99 * best_of(found).seconds.step
    assert found.limit.startswith("memory: with more of it") == faster_with_room


def test_nothing_fits(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllava.planner.plan.ROWS", (4096,))
    found = plan_stage(config, LENGTHS, tiny_gpu(5), 1)
    assert (found.chosen, found.hours, found.limit) == (None, None, "memory: nothing fits")
    text = "\n".join(lines(found))
    assert "nothing fits into the 0.0 GiB of tiny" in text
    assert as_json(found)["chosen"] is None


def test_report(config: Config) -> None:
    found = plan_stage(config, LENGTHS, GPUS["a100-80g"], 8)
    text = "\n".join(lines(found))
    for words in (
        "finetune on 8 x a100-80g, bf16: predicted",
        "recompute=none",
        "<- chosen",
        "optimizer",
        "GPU-hours",
        "limited by",
        "communication",
    ):
        assert words in text
    assert "fp8" not in text
    in_fp8 = found.config.model_copy(update={"train": found.config.train.model_copy(update={"fp8": "rowwise"})})
    assert "rowwise is not foreseen" in "\n".join(lines(dataclasses.replace(found, config=in_fp8)))
    told = json.loads(json.dumps(as_json(found)))
    assert told["chosen"]["peak_memory_bytes"] == sum(told["chosen"]["memory_bytes"].values())
    assert told["gpu_hours"] == pytest.approx(8 * told["hours"])
    assert told["predicted"] is True


def test_command_adds_the_stages_up(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for stage in ("pretrain", "finetune"):
        path = tmp_path / f"{stage}.yaml"
        path.write_text(
            f"stage: {stage}\noutput_dir: {tmp_path}/out\nmodel: {{llm: {config.model.llm}, vision_tower: {config.model.vision_tower}}}\n"
            "data: {records: nowhere.json}\n"
        )
        files.append(str(path))
    plan_command(
        [*files, "train.global_batch=64", "train.reference_micro_batch=16"], "h200", world=1, drawn=256, json_file=tmp_path / "plan.json"
    )
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["steps"] for stage in told] == [4, 4]
    assert f"all stages: {sum(stage['hours'] for stage in told):.1f} h" in out


def test_command_needs_neither_models_nor_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("stage: pretrain\noutput_dir: o\nmodel: {llm: nowhere, vision_tower: nowhere}\ndata: {records: nowhere.json}\n")
    plan_command([str(path)], "h200", world=1, drawn=512, size="tiny", json_file=tmp_path / "plan.json")
    (told,) = json.loads((tmp_path / "plan.json").read_text())
    assert (told["samples"], told["steps"]) == (512, 2)
    assert told["parameters"]["trained"] == 32 * 64 + 64 + 64 * 64 + 64
    for words, drawn in (("--size: '70b' is none of 7b, 13b", 512), ("--size: a size without its folders has no tokenizer", None)):
        with pytest.raises(UserError, match=words):
            plan_command([str(path)], "h200", world=1, drawn=drawn, size="70b", json_file=None)
    capsys.readouterr()


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_committed_plans_are_those_of_this_code(size: str, repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hours of README and docs/planning.md; the file is written by the command of docs/planning.md."""
    configs = [str(repo / "configs" / f"llava15_{size}_{stage}.yaml") for stage in ("pretrain", "finetune")]
    plan_command(configs, "a100-80g", world=8, size=size, drawn=0, json_file=tmp_path / "plan.json")
    capsys.readouterr()
    told = json.loads((tmp_path / "plan.json").read_text())
    committed = json.loads((repo / "benches" / "results" / f"plan_8xa100-80g_{size}.json").read_text())
    for now, then in zip(told, committed, strict=True):
        for name in ("recompute", "micro_batch_tokens"):
            assert now["chosen"][name] == then["chosen"][name]
        # Versions of PyTorch differ in a few allocations, and in nothing that takes time.
        assert now["hours"] == pytest.approx(then["hours"], rel=1e-3)
        assert now["chosen"]["peak_memory_bytes"] == pytest.approx(then["chosen"]["peak_memory_bytes"], rel=0.02)


CARDS = ("rtx4090-24g", "l40s-48g", "a100-80g")


def cards_of_the_docs(text: str) -> dict[str, list[str]]:
    """By GPU, the cells of docs/planning.md of 7B and 13B, each with LoRA and with QLoRA."""
    return {gpu: cells.split(" | ") for gpu, cells in re.findall(r"^\| \d+ GB \(`(.*?)`.*?\) \| (.*) \|$", text, re.MULTILINE)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("gpu", CARDS)
def test_the_cards_of_the_docs_are_those_of_this_code(gpu: str, repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What fits on one card with LoRA and QLoRA, and the seconds of a step of 7B on the smallest."""
    text = (repo / "docs" / "planning.md").read_text(encoding="utf-8")
    assert list(cards_of_the_docs(text)) == list(CARDS)
    found, seconds = [], []
    for size, words in itertools.product(("7b", "13b"), ([], ["model.quantize=nf4"])):
        config = str(repo / "configs" / f"llava15_{size}_finetune_lora.yaml")
        plan_command([config, *words], gpu, world=1, size=size, drawn=2000, json_file=tmp_path / "plan.json")
        (told,) = json.loads((tmp_path / "plan.json").read_text())
        if (chosen := told["chosen"]) is None:
            least = min(candidate["peak_memory_bytes"] for candidate in told["candidates"])
            found.append(f"no: {least / 2**30:.0f} GiB at least")
            continue
        place = f"{chosen['micro_batch_tokens']:,} tokens, `{chosen['recompute']}`"
        found.append(f"{place}: {chosen['peak_memory_bytes'] / 2**30:.0f} GiB")
        seconds.append(chosen["step_seconds"])
    capsys.readouterr()
    assert found == cards_of_the_docs(text)[gpu]
    if gpu == CARDS[0]:
        lora, qlora = seconds[:2]
        assert f"{qlora:.0f} s with 7B and QLoRA, and {lora:.0f} s with LoRA" in text


def test_gpus_are_those_of_the_accounting() -> None:
    assert {gpu.peak for gpu in GPUS.values()} <= set(PEAK_FLOPS.values())
    with pytest.raises(UserError, match="--gpu: 'h100' is not listed"):
        gpu_named("h100")


def test_a_held_out_share_is_not_trained_on_and_its_evaluations_are_foreseen(config: Config) -> None:
    whole = plan_stage(config, LENGTHS, GPUS["h200"], 1)
    assert whole.evaluations is None
    looked_at = config.model_copy(update={"eval": config.eval.model_copy(update={"held_out": 0.25, "every_steps": 2})})
    found = plan_stage(looked_at, LENGTHS, GPUS["h200"], 1)
    # 72 samples are 3 steps: before steps 0 and 2, and at the end.
    assert (found.plan.n_samples, found.plan.n_steps) == (72, 3)
    assert found.evaluations is not None
    assert (found.evaluations.samples, found.evaluations.times) == (24, 3)
    # All samples are alike, and a forward is a third of what trains the decoder; the tower, which has no backward, is small here.
    step = best_of(whole).seconds
    computed = (step.products + step.attention) * whole.plan.n_steps * 24 / 96
    # Of attention alone a forward is a seventh: backward has more operations, and reaches less.
    assert 1 / 7 < found.evaluations.seconds / computed < 0.5
    assert any("24 held-out samples in" in line and "3 times" in line for line in lines(found))
    assert as_json(found)["evaluations"]["times"] == 3
