"""The certificate holds where the run equals plain PyTorch, and names what is wrong where something is."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from fastllava.certify import variants as module
from fastllava.certify.judge import ALL, COMPARISONS, LOSS
from fastllava.certify.page import Certificate, lines
from fastllava.certify.run import certify
from fastllava.config import check_config
from fastllava.data import loader
from fastllava.errors import UserError
from fastllava.model.execution import COMPUTE_DTYPE, Execution
from fastllava.model.ops import choose_ops, reference_ops
from fastllava.model.weights import load_llava
from fastllava.train.stages import prepare_stage
from fastllava_kernels import rooms
from fastllava_kernels.room import Implementation


def certified(values: dict[str, Any], **options: Any) -> Certificate:
    return certify(check_config(values), lambda _: None, **{"n_steps": 1, "n_samples": 4, **options})


def failing(certificate: Certificate) -> set[str]:
    """The comparisons that do not hold."""
    return {comparison.name for comparison in COMPARISONS if certificate.failures(comparison)}


def names_of(certificate: Certificate, comparison: str) -> set[str]:
    """What fails in one of them."""
    return {each.name for each in certificate.failures() if each.comparison.name == comparison}


CASES = [
    ("pretrain", "llama"),
    ("finetune", "llama"),
    ("finetune", "qwen2_tied"),
    ("finetune", "llama_biased"),
    ("finetune", "mistral"),
    ("finetune", "qwen3"),
    ("finetune", "mpt"),
]


@pytest.mark.parametrize(("stage", "llm"), CASES)
def test_it_holds_in_fp32_for_all_that_trains(stage, llm, settings):
    values = settings(stage, llm)
    n_steps = 2 if llm == "llama" else 1
    certificate = certified(values, n_steps=n_steps)
    assert certificate.holds, certificate.verdict()
    config = check_config(values)
    ops = choose_ops(config.kernels, torch.device("cpu"), torch.float32)
    trained = prepare_stage(load_llava(config.model, Execution(ops, COMPUTE_DTYPE["fp32"]), 0), config)
    steps = {each.step for each in certificate.judged}
    assert len(steps) == n_steps
    for comparison in COMPARISONS:
        for step in steps:
            judged = [each.name for each in certificate.judged if (each.comparison, each.step) == (comparison, step)]
            assert sorted(judged) == sorted([LOSS, ALL, *trained])
    for each in certificate.judged:
        assert each.found is not None
        assert each.found.error < 1e-5
        assert each.found.norm > 0
        assert each.name in (LOSS, ALL) or (each.found.cosine or 0) > 1 - 1e-9


@pytest.mark.parametrize(("stage", "llm"), [("pretrain", "llama"), ("finetune", "qwen2_tied")])
def test_it_holds_in_bf16(stage, llm, settings):
    certificate = certified(settings(stage, llm, kernels="reference", train={"precision": "bf16", "recompute": "full"}))
    assert certificate.holds, certificate.verdict()
    errors = [each.found.error for each in certificate.judged if each.found and each.name not in (LOSS, ALL)]
    assert max(errors) > 1e-4, "bf16 does round"


def test_attention_across_samples_is_found_and_named_as_packing(settings, monkeypatch):
    honest = loader.pack

    def leaking(*args: Any) -> Any:
        batch = honest(*args)
        rows = len(batch.token_ids)
        return dataclasses.replace(batch, cu_seqlens=torch.tensor([0, rows], dtype=torch.int32), max_seqlen=rows)

    monkeypatch.setattr(loader, "pack", leaking)
    certificate = certified(settings())
    assert failing(certificate) == {"whole", "packing"}
    assert {LOSS, "llm.model.layers.0.self_attn.q_proj.weight", "projector.0.weight"} <= names_of(certificate, "packing")
    assert certificate.verdict().startswith("FAILS in whole, packing: ")


def test_a_lever_is_found_and_named_beside_the_kernels(settings):
    """It makes another training, and the certificate says so; bf16 weights alone only move otherwise."""
    certificate = certified(settings(kernels="reference", train={"precision": "bf16", "fp8": "rowwise"}))
    assert failing(certificate) == {"whole", "kernels"}
    assert "train.fp8=rowwise" in next(line for line in lines(certificate) if line.startswith("setting"))
    assert certified(settings(kernels="reference", train={"precision": "bf16"}, optim={"master": "bf16"})).holds


class OnePercentMore(torch.autograd.Function):
    """The identity, whose gradient is wrong."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kernel_with_a_gradient_off_by_one_percent_is_found_and_named(precision, settings, monkeypatch):
    room = rooms()["swiglu"]
    reference = room.implementations["reference"].function
    wrong = Implementation(lambda gate, up: OnePercentMore.apply(reference(gate, up)))
    monkeypatch.setitem(vars(room), "implementations", {**room.implementations, "wrong": wrong})
    certificate = certified(settings(kernels={"swiglu": "wrong"}, train={"precision": precision}))
    assert failing(certificate) == {"whole", "kernels"}
    named = names_of(certificate, "kernels")
    assert {"llm.model.layers.1.mlp.gate_proj.weight", "llm.model.layers.1.mlp.up_proj.weight"} <= named
    # What comes after it in the forward pass has the right gradient.
    assert not named & {LOSS, "llm.lm_head.weight", "llm.model.layers.1.mlp.down_proj.weight", "llm.model.norm.weight"}


def test_a_weight_that_is_off_is_found(settings, monkeypatch):
    honest = module.rebuilt

    def nudged(model: Any, execution: Any) -> Any:
        other = honest(model, execution)
        parameter = other.llm.model.layers[0].mlp.up_proj.weight
        if execution.ops.chosen != reference_ops().chosen:
            parameter.data = parameter * 1.001
        return other

    monkeypatch.setattr(module, "rebuilt", nudged)
    certificate = certified(settings())
    assert failing(certificate) == {"whole", "kernels"}
    assert "llm.model.layers.0.mlp.gate_proj.weight" in names_of(certificate, "whole")


def test_modules_that_compute_otherwise_are_told_from_kernels_and_packing(settings, monkeypatch):
    honest = module.rebuilt

    def other(model: Any, execution: Any) -> Any:
        changed = honest(model, execution)
        changed.llm.model.norm.eps *= 100
        return changed

    monkeypatch.setattr(module, "rebuilt", other)
    assert failing(certified(settings())) == {"whole", "modules"}


def test_a_parameter_that_does_not_train_is_named(settings, monkeypatch):
    honest = module.prepare_stage

    def forgets(model: Any, config: Any) -> Any:
        trained = honest(model, config)
        model.llm.model.norm.weight.requires_grad_(False)
        del trained["llm.model.norm.weight"]
        return trained

    monkeypatch.setattr(module, "prepare_stage", forgets)
    certificate = certified(settings())
    assert not certificate.holds
    assert names_of(certificate, "whole") == {"llm.model.norm.weight", ALL}
    assert "'configured' gives it no gradient" in certificate.verdict()


def test_text_alone_gives_a_projector_gradient_of_zero(settings, world):
    texts = [record for record in json.loads((world / "chats.json").read_text()) if "image" not in record]
    (world / "texts.json").write_text(json.dumps(texts))
    certificate = certified(settings(data={"records": str(world / "texts.json")}))
    assert certificate.holds, certificate.verdict()
    found = certificate.figures[0]["configured"]["projector.0.weight"]
    assert (found.norm, found.error, found.cosine) == (0.0, 0.0, None)


def test_the_originals_weights_and_padding_do_not_matter(settings):
    """Another split into padded batches, loss_norm llava, samples as long as micro-batches: all the same training."""
    values = settings(train={"loss_norm": "llava", "micro_batch_tokens": 1, "last_layer": "all"})
    first, second = (certified(values, n_samples=0, padded_batch=size) for size in (1, 5))
    assert first.holds, first.verdict()
    assert second.holds, second.verdict()
    assert first.steps[0]["micro_batches"] == 8
    assert first.figures[0]["configured"][LOSS].norm == second.figures[0]["configured"][LOSS].norm


def test_the_configured_variant_alone_is_compiled_and_has_the_configs_kernels(settings, monkeypatch):
    honest, seen = module.rebuilt, []

    def watched(model: Any, execution: Execution) -> Any:
        seen.append((execution.ops.chosen["attention"], execution.recompute, execution.compile))
        return honest(model, dataclasses.replace(execution, compile="off"))

    monkeypatch.setattr(module, "rebuilt", watched)
    certificate = certified(settings(kernels={"attention": "sdpa"}, train={"compile": "layer", "recompute": "norms"}))
    assert certificate.holds, certificate.verdict()
    # The three variants with modules of this project, for the one step.
    plainly = ("reference", "norms", "off")
    assert seen == [plainly, plainly, ("sdpa", "norms", "layer")]


def test_a_config_of_the_originals_runs_holds(golden, tmp_path):
    from golden_trace import config_of

    assert certified(config_of("pretrain", golden, tmp_path / "golden"), n_samples=2).holds


def test_too_little_memory_is_one_line(settings, monkeypatch):
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "accumulate", full)
    with pytest.raises(UserError, match=r"^certify: 'truth' .* needs more memory than this GPU has; write --padded-batch 1, or train"):
        certified(settings())


LORA = {"rank": 4, "dropout": 0.25}


@pytest.mark.parametrize("llm", ["llama", "qwen3"])
def test_it_holds_with_adapters_and_their_dropout(llm, settings):
    certificate = certified(settings("finetune", llm, lora=LORA, optim={"projector_lr": 1e-3}))
    assert certificate.holds, certificate.verdict()
    judged = {each.name for each in certificate.judged}
    assert any(name.endswith("q_proj.lora_A.weight") for name in judged)
    assert not any(name.endswith("proj.weight") for name in judged)
    for each in certificate.judged:
        assert each.found is not None
        assert each.found.norm > 0
        assert each.found.error < 1e-5
    assert any("0.25 of its input dropped" in line and "every way saw the same" in line for line in lines(certificate))
    assert any("B, which begins as zeros, is drawn here" in line for line in lines(certificate))


def test_a_mask_that_depends_on_the_micro_batch_is_found(settings, monkeypatch):
    honest = loader.row_keys
    monkeypatch.setattr(loader, "row_keys", lambda seed, step, samples, lengths: honest(seed, step, range(len(samples)), lengths))
    assert failing(certified(settings("finetune", "llama", lora=LORA))) == {"packing", "whole"}
