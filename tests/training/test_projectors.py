"""A projector that makes fewer tokens of an image, from captions to an exported model: everything that counts tokens follows it."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from fastllava.certify.run import certify
from fastllava.config import check_config
from fastllava.data.loader import pack, read_sample
from fastllava.data.prepared import PreparedSet
from fastllava.errors import UserError
from fastllava.export import export
from fastllava.model.build import rebuilt
from fastllava.model.execution import Execution
from fastllava.model.ops import choose_ops
from fastllava.model.weights import load_llava, read_origin
from fastllava.planner.simulate import FROZEN, MicroBatch, gpu_ops, simulate
from fastllava.train import run
from fastllava.train.dataset import prepare_data
from fastllava.train.metrics.flops import Accounting
from fastllava.train.metrics.log import read_metrics

PATCHES, TOKENS = 16, 4
PROJECTOR = "mlp_downsample"


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tower with a grid of 4x4 patches."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(1)
    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14)
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def trained(settings, tower, tmp_path):
    """`trained(stage, name, **sections)`: the config of a run in the folder `name` that is over, and what it said."""

    def train(stage: str, name: str, model=None, **sections):
        model = {"vision_tower": str(tower), "projector_type": PROJECTOR, **(model or {})}
        sections["train"] = {"max_steps": 4, "checkpoint_steps": 2, **sections.get("train", {})}
        config = check_config(settings(stage, output_dir=str(tmp_path / name), model=model, **sections))
        said = io.StringIO()
        run(config, Console(file=said, width=1000))
        return config, said.getvalue()

    return train


def lengths(config) -> list[int]:
    """The tokens of each sample of the run."""
    summary = json.loads((config.output_dir / "run_summary.json").read_text())
    return PreparedSet.open(Path(summary["prepared"])).n_tokens.tolist()


def losses(config) -> list[float]:
    return [row["loss"] for row in read_metrics(config.output_dir)]


def test_from_captions_to_an_export(trained, tmp_path):
    first, said = trained("pretrain", "one")
    assert "projector: mlp_downsample, fresh; 4 tokens an image in place of 16; VILA's projector, " in said
    assert "another model than LLaVA-1.5" in said
    assert "layer_norm=" in next(line for line in said.splitlines() if "kernels:" in line)
    plain, _ = trained("pretrain", "plain", model={"projector_type": "mlp2x_gelu"})
    assert [long - short for long, short in zip(lengths(plain), lengths(first), strict=True)] == [PATCHES - TOKENS] * len(lengths(first))

    handed = first.output_dir / "mm_projector.safetensors"
    assert sorted(load_file(handed)) == [f"model.mm_projector.layers.{i}.{kind}" for i in (1, 2, 4) for kind in ("bias", "weight")]
    second, _ = trained("finetune", "two", model={"projector": str(handed)})
    start, end = load_file(handed), load_file(second.output_dir / "model.safetensors")
    assert not any(torch.equal(tensor, end[name]) for name, tensor in start.items()), "every weight of the projector trains"

    # The result is read as a whole LLaVA, and goes on from there.
    written = json.loads((second.output_dir / "config.json").read_text())
    assert written["mm_projector_type"] == PROJECTOR
    third, _ = trained("finetune", "three", model={"llm": str(second.output_dir), "projector": None}, optim={"lr": 1e-9})
    assert losses(third)[0] < losses(second)[0]

    said = []
    export(second.output_dir, "llava", tmp_path / "a-llava", said.append)
    assert "config.json: mm_projector_type mlp_downsample is none that the original's code builds; fastllava reads it" in said
    assert any("logits of a fixed image and prompt are equal" in line for line in said)
    with pytest.raises(UserError, match=r"^--layout: hf holds mlp2x_gelu .* only, this one is mlp_downsample; write --layout llava$"):
        export(second.output_dir, "hf", tmp_path / "hf", said.append)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("mode", ["layer", pytest.param("step", marks=pytest.mark.exhaustive)])
def test_as_graphs_it_gives_the_eager_loss(settings, tower, mode):
    torch._dynamo.reset()
    config = check_config(settings("finetune", model={"vision_tower": str(tower), "projector_type": PROJECTOR}))
    ops = choose_ops({}, torch.device("cpu"), torch.float32, compiled=True)
    eager = load_llava(config.model, Execution(ops, torch.float32), 0)
    compiled = rebuilt(eager, Execution(ops, torch.float32, compile=mode, backend="aot_eager"))
    _, spec, prepared = prepare_data(config, lambda line: None)
    samples = [read_sample(prepared, spec, config.data, index, 1.0) for index in range(3)]
    batch = pack(samples, spec, config.data.max_tokens)
    torch.testing.assert_close(compiled(batch), eager(batch), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_unbroken_one(trained, tmp_path):
    whole, _ = trained("finetune", "whole")
    broken, _ = trained("finetune", "broken")
    (broken.output_dir / "run_summary.json").unlink()
    shutil.rmtree(broken.output_dir / "checkpoint-4")
    again, said = trained("finetune", "broken")
    assert "resuming before step 2" in said
    assert losses(again) == losses(whole)
    first, second = (load_file(config.output_dir / "model.safetensors") for config in (whole, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    with pytest.raises(UserError, match=r"model\.projector_type was '?mlp_downsample'? and is now '?mlp2x_gelu"):
        trained("finetune", "broken", model={"projector_type": "mlp2x_gelu"})


def test_the_file_of_another_projector_is_told_for_what_it_is(trained):
    plain, _ = trained("pretrain", "plain", model={"projector_type": "mlp2x_gelu"})
    file = plain.output_dir / "mm_projector.safetensors"
    with pytest.raises(UserError, match=r"model\.projector: .* another type; write model\.projector_type=mlp2x_gelu$"):
        trained("finetune", "two", model={"projector": str(file)})
    joined, _ = trained("pretrain", "joined")
    file = joined.output_dir / "mm_projector.bin"
    with pytest.raises(UserError, match=r"model\.projector: .* another type; write model\.projector_type=mlp_downsample$"):
        trained("finetune", "two", model={"projector": str(file), "projector_type": "mlp2x_gelu"})


def test_the_cut_counts_the_tokens_that_there_are(trained, world, tmp_path):
    """What is whole with four tokens an image is cut with sixteen."""
    records = tmp_path / "records.json"
    records.write_text(json.dumps([record for record in json.loads((world / "chats.json").read_text()) if "image" in record]))
    limits = {"records": str(records), "max_quarantined_share": 1.0}
    joined, _ = trained("finetune", "joined", data=limits, train={"max_steps": 1})
    longest = max(lengths(joined))
    cut, _ = trained("finetune", "cut", data={"max_tokens": longest, **limits}, train={"max_steps": 1})
    assert lengths(cut) == lengths(joined)
    shorter, _ = trained("finetune", "shorter", data={"max_tokens": longest - 1, **limits}, train={"max_steps": 1})
    assert sorted(lengths(shorter)) == sorted(min(length, longest - 1) for length in lengths(joined))
    plain, _ = trained("finetune", "plain", model={"projector_type": "mlp2x_gelu"}, data={"max_tokens": longest, **limits})
    assert lengths(plain) == [min(length + PATCHES - TOKENS, longest) for length in lengths(joined)]


def test_kernels_and_packing_give_the_certificates_gradients(trained, settings, tower, tmp_path):
    model = {"vision_tower": str(tower), "projector_type": PROJECTOR}
    certificate = certify(check_config(settings("finetune", model=model)), lambda line: None, n_samples=4, n_steps=1)
    assert certificate.holds, certificate.verdict()


def test_forecasts_count_the_tokens_that_there_are(settings, tower):
    def config_of(projector_type):
        return check_config(settings("pretrain", model={"vision_tower": str(tower), "projector_type": projector_type}))

    costs = {}
    for projector_type in ("mlp2x_gelu", PROJECTOR):
        config = config_of(projector_type)
        origin = read_origin(config.model)
        tokens = origin.spec.patches
        assert tokens == (TOKENS if projector_type == PROJECTOR else PATCHES)
        size = MicroBatch(rows=200 + 10 * tokens, samples=10, images=10, supervised=60, longest=20 + tokens)
        costs[projector_type] = simulate(config, origin, gpu_ops({}), size, accumulates=True)
        assert Accounting.of(config).cost().per_image > 0
    before, after = costs.values()
    assert after.peak - after.memory[FROZEN] < before.peak - before.memory[FROZEN]
