"""QLoRA: adapters over a base in NF4 train as over the same base dequantised, stopped, packed, certified and in several processes."""

import json
import re
import shutil
import signal
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from adapter_runs import assert_near, trained
from parallel_runs import launch, stop_after
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

from benches.lib.timing import allocations
from fastllava.certify.run import certify
from fastllava.config import check_config
from fastllava.errors import UserError
from fastllava.export.subject import find_subject, load_subject
from fastllava.model.build import rebuilt
from fastllava.model.execution import Execution
from fastllava.model.ops import choose_ops, reference_ops
from fastllava.model.quantised import Nf4Weight, count, dense, weights_by_name
from fastllava.model.weights import load_llava
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics
from fastllava.train.stages import prepare_stage
from fastllava_kernels.nf4 import dequantise, quantise

LORA = {"rank": 4, "dropout": 0.25}
LINEAR = re.compile(r"model\.layers\.\d+\.\w+\.\w+_proj\.weight")


def values_of(settings, out, quantize: str | None = "nf4", **sections):
    sections = {"lora": LORA, "optim": {"lr": 1e-2, "projector_lr": 1e-3, "warmup_ratio": 0.0}, **sections}
    model = {"quantize": quantize, **sections.pop("model", {})}
    return settings("finetune", output_dir=str(out), **{**sections, "model": model, "train": {"max_steps": 4, **sections.get("train", {})}})


@pytest.fixture(scope="session")
def twin(world, tmp_path_factory):
    """`twin(double)`: the folder of the world's llm with what its linear layers' weights become in NF4, in fp32."""
    made: dict[bool, Path] = {}

    def folder(double: bool) -> Path:
        if double not in made:
            made[double] = tmp_path_factory.mktemp("twin") / "llm"
            shutil.copytree(world / "llm", made[double])
            tensors = load_file(world / "llm" / "model.safetensors")
            changed = {name: dequantise(quantise(tensor, double)) if LINEAR.fullmatch(name) else tensor for name, tensor in tensors.items()}
            save_file(changed, made[double] / "model.safetensors", {"format": "pt"})
        return made[double]

    return folder


def model_of(config):
    return load_llava(config.model, Execution(reference_ops(), torch.float32), 5, config.lora)


CASES = {
    "nf4": ("nf4", {}),
    "nf4_double": ("nf4_double", {}),
    "some layers without adapters": ("nf4", {"lora": {**LORA, "targets": ["k_proj", "down_proj"]}}),
    "computed again": ("nf4", {"train": {"recompute": "full"}}),
    "some of it computed again": (
        "nf4_double",
        {"train": {"recompute": "selective", "micro_batch_tokens": 1}, "lora": {**LORA, "targets": ["q_proj", "up_proj"]}},
    ),
    "references": ("nf4", {"kernels": "reference"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_over_the_dequantised_base(settings, tmp_path, twin, case):
    quantize, changes = CASES[case]
    found = trained(values_of(settings, tmp_path / "quantised", quantize, **changes))
    base = {"llm": str(twin(quantize == "nf4_double"))}
    expected = trained(values_of(settings, tmp_path / "twin", None, **{**changes, "model": base}))
    assert_near(found, expected)
    assert found[0][0]["loss"] != trained(values_of(settings, tmp_path / "plain", None, train={"max_steps": 1}))[0][0]["loss"]


@pytest.mark.parametrize("quantize", ["nf4", "nf4_double"])
def test_linear_layers_of_the_decoder_are_quantised_and_nothing_else(settings, tmp_path, quantize):
    quantised, plain = (model_of(check_config(values_of(settings, tmp_path, each))) for each in (quantize, None))
    found, expected = weights_by_name(quantised), dict(plain.named_parameters())
    assert found.keys() == expected.keys()
    held = {name for name, weight in found.items() if isinstance(weight, Nf4Weight)}
    assert held == {name for name in found if LINEAR.fullmatch(name.removeprefix("llm."))}
    assert len(held) == 2 * 7
    assert count(quantised) == sum(parameter.numel() for parameter in plain.parameters())
    for name, tensor in dense(quantised, torch.float32):
        stands_for = dequantise(quantise(expected[name], quantize == "nf4_double")) if name in held else expected[name]
        assert torch.equal(tensor, stands_for)
    bits = 8 * sum(tensor.nbytes for name in held for tensor in found[name].tensors) / sum(expected[name].numel() for name in held)
    assert bits < (4.6 if quantize == "nf4" else 4.3)


def test_what_is_loaded_is_rounded_to_the_compute_dtype_first(settings, tmp_path):
    config = check_config(values_of(settings, tmp_path))
    model = load_llava(config.model, Execution(reference_ops(), torch.bfloat16), 5, config.lora)
    plain = load_llava(config.model.model_copy(update={"quantize": None}), Execution(reference_ops(), torch.bfloat16), 5, config.lora)
    weights = weights_by_name(model)
    name = "llm.model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights[name].codes, quantise(dict(plain.named_parameters())[name]).codes)
    assert weights[name].absmax.dtype is torch.float32


def test_loading_holds_less_than_the_largest_file(world, settings, tmp_path, monkeypatch):
    """The decoder lies in three files. A file that is read is mapped and counts apart: its pages are the system's to drop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary = json.loads((world / "llm" / "config.json").read_text())["vocab_size"]
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": vocabulary}
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(tmp_path / "llm", max_shard_size="6MB")
    files = [path.stat().st_size for path in (tmp_path / "llm").glob("*.safetensors")]
    assert len(files) >= 3
    # As small beside the model as the real one beside a real model.
    monkeypatch.setattr("fastllava_kernels.nf4._PIECE", 2**12)

    def most(quantize: str | None) -> int:
        model, held = {"llm": str(tmp_path / "llm"), "tokenizer": str(world / "llm")}, []
        config = check_config(values_of(settings, tmp_path, quantize, model=model, lora={"rank": 1}))
        execution = Execution(reference_ops(), torch.bfloat16)
        changes = allocations(lambda: held.append(load_llava(config.model, execution, 5, config.lora)))[1]
        mapped = [change if abs(change) in files else 0 for change in changes]
        assert max(accumulate(mapped)) == max(files), "one file at a time"
        return max(accumulate(change - of_file for change, of_file in zip(changes, mapped, strict=True)))

    # Without, all weights are held, in the two bytes each that they have in the files.
    assert most(None) > 0.99 * sum(files)
    assert most("nf4_double") < most("nf4") < 0.35 * sum(files) < max(files)


def test_a_stopped_run_goes_on_bit_for_bit_and_with_the_same_base_alone(settings, tmp_path):
    unbroken = trained(values_of(settings, tmp_path / "unbroken"))
    values = values_of(settings, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert run(check_config(values), Console(quiet=True)).stopped_by is signal.SIGTERM
    for other in ("nf4_double", None):
        with pytest.raises(UserError, match=r"model\.quantize") as caught:
            run(check_config(values_of(settings, tmp_path / "run", other)), Console(quiet=True))
        assert "\n" not in str(caught.value)
    resumed = trained(values)
    exact = ("step", "loss", "grad_norm", "lr")
    assert [[row[key] for key in exact] for row in resumed[0]] == [[row[key] for key in exact] for row in unbroken[0]]
    assert all(torch.equal(resumed[1][name], tensor) for name, tensor in unbroken[1].items())


@pytest.mark.parametrize("checkpoint", [False, True], ids=["output_dir", "checkpoint"])
def test_adapters_are_merged_into_the_weights_as_they_are_stored(world, settings, tmp_path, checkpoint):
    """Which are known to be those that the training began with."""
    _, weights = trained(values_of(settings, tmp_path, lora={"rank": 4, "alpha": 12.0}))
    said: list[str] = []
    subject = find_subject(next(tmp_path.glob("checkpoint-*")) if checkpoint else tmp_path, said.append)
    found = dict(load_subject(subject, said.append).named_parameters())
    assert any("trained over weights in nf4; they are merged into those weights as they are stored" in line for line in said)
    stored = load_file(world / "llm" / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        up, down = (next(tensor for key, tensor in weights.items() if key.endswith(f"{name}.lora_{part}.weight")) for part in "BA")
        added = up @ down
        assert added.any()
        assert torch.allclose(found[f"llm.{name}.weight"], stored[f"{name}.weight"] + 3.0 * added, rtol=1e-5, atol=1e-7)


def test_two_processes_train_as_one_does(settings, world, tmp_path):
    """The base whole on each, whatever its size."""
    values = values_of(settings, tmp_path / "one", "nf4_double", lora={"rank": 4, "dropout": 0.1}, train={"device": "cpu"})
    values["data"]["prepared_dir"] = str(world / "prepared")
    alone = trained(values)
    launch(2, [({**values, "output_dir": str(tmp_path / "two")}, None)], tmp_path / "said")
    rows = read_metrics(tmp_path / "two")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone[0]], rel=1e-5) != []
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in alone[0]], rel=1e-4)


def test_graphs_of_torch_compile_take_it(settings, tmp_path):
    torch._dynamo.reset()
    config = check_config(values_of(settings, tmp_path, lora={**LORA, "targets": ["q_proj", "gate_proj"]}))
    ops, graphs = choose_ops({}, torch.device("cpu"), torch.float32, compiled=True), CompileCounterWithBackend("aot_eager")
    eager = rebuilt(model_of(config), Execution(ops, torch.float32))
    compiled = rebuilt(eager, Execution(ops, torch.float32, compile="layer", backend=graphs))
    draws, found = torch.Generator().manual_seed(0), []
    x_TD = torch.randn(6, 32, generator=draws)
    for model in (eager, compiled):
        prepare_stage(model, config)
        out = model.llm(x_TD, torch.arange(6), torch.tensor([0, 6], dtype=torch.int32), 6)
        out.square().sum().backward()
        found.append([out, *(parameter.grad for parameter in model.llm.parameters() if parameter.grad is not None)])
    assert graphs.frame_count >= 1
    assert len(found[0]) == len(found[1]) > 4
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*found, strict=True))


def test_the_certificate_holds_over_the_base_as_it_is_kept(settings, tmp_path):
    config = check_config(values_of(settings, tmp_path))
    certificate = certify(config, lambda _: None, n_steps=1, n_samples=4)
    assert certificate.holds, certificate.verdict()
    assert any(each.name.endswith("q_proj.lora_A.weight") for each in certificate.judged)


REFUSED = {
    "no adapters": (
        {"lora": {}},
        r"model\.quantize: 'nf4' is for frozen weights under adapters, and there are none; write lora\.rank=128, say",
    ),
    "sharded": ({"parallel": {"frozen": "shard"}}, r"parallel\.frozen: 'shard', .* write parallel\.frozen=replicate"),
    "fp8": ({"train": {"fp8": "rowwise", "precision": "bf16"}}, r"train\.fp8: 'rowwise' does not go with adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_it_is_one_line(settings, tmp_path, case):
    changes, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        check_config(values_of(settings, tmp_path, **changes))


def test_stage_pretrain_does_not_take_it(settings):
    with pytest.raises(UserError, match=r"model\.quantize: .*write model\.quantize=null"):
        check_config(settings("pretrain", model={"quantize": "nf4"}))


def test_weights_that_are_not_finite_are_named(world, settings, tmp_path):
    shutil.copytree(world / "llm", tmp_path / "llm")
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, tmp_path / "llm" / "model.safetensors", {"format": "pt"})
    config = check_config(values_of(settings, tmp_path, model={"llm": str(tmp_path / "llm")}))
    with pytest.raises(
        UserError, match=r"model\.llm: .*llm has model\.layers\.1\.mlp\.up_proj\.weight, which holds numbers that are not finite"
    ):
        model_of(config)
