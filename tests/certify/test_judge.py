"""How a variant is judged: distance from the truth, what is allowed of it, and what can never hold."""

import math
from dataclasses import replace

import pytest
import torch

from fastllava.certify.judge import ALL, FLOOR, LOSS, SLACK, ZERO, Figures, judge, kind_of, measure
from fastllava.certify.page import Certificate, as_json, lines
from fastllava.certify.variants import TRUTH, VARIANTS, Outcome

CPU, FP32 = torch.device("cpu"), torch.float32


def measured(found: dict[str, list[float]], truth: dict[str, list[float]], loss: float = 2.0) -> dict[str, Figures]:
    outcomes = [Outcome(value, {name: torch.tensor(g) for name, g in grads.items()}, 0.0) for value, grads in ((loss, found), (2.0, truth))]
    return measure(*outcomes, 10**9, CPU)


def test_figures_are_the_definitions():
    found = measured({"a": [3.0, 4.5]}, {"a": [3.0, 4.0]}, loss=2.1)
    assert found[LOSS].error == pytest.approx(0.05)
    assert found["a"].norm == pytest.approx(math.hypot(3, 4.5))
    assert found["a"].error == pytest.approx(0.1)
    assert found["a"].scale == pytest.approx((9 + 18) / 25 - 1)
    assert found["a"].cosine == pytest.approx(27 / (5 * math.hypot(3, 4.5)))
    assert found[ALL] == replace(found["a"], independent=10**9)


def test_a_large_gradient_is_measured_piece_by_piece(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    truth, off = (torch.randn(7, 11, generator=generator) for _ in range(2))
    whole = measure(Outcome(1.0, {"a": truth + off}, 0.0), Outcome(1.0, {"a": truth}, 0.0), 77, CPU)["a"]
    monkeypatch.setattr("fastllava.certify.judge._PIECE", 5)
    pieces = measure(Outcome(1.0, {"a": truth + off}, 0.0), Outcome(1.0, {"a": truth}, 0.0), 77, CPU)["a"]
    assert vars(pieces) == pytest.approx(vars(whole))
    assert whole.error == pytest.approx(float(off.norm() / truth.norm()))


def verdicts(configured: dict[str, Figures], others: dict[str, Figures], truth: list[str], dtype: torch.dtype = FP32) -> dict[str, bool]:
    """The verdicts of the comparison "whole", by tensor name."""
    figures = dict.fromkeys(VARIANTS, others) | {"configured": configured}
    return {each.name: each.holds for each in judge(0, figures, truth, dtype) if each.comparison.name == "whole"}


def of_error(error: float, scale: float = 0.0) -> dict[str, Figures]:
    return {LOSS: Figures(1.0, 0.0), ALL: Figures(1.0, 0.0), "a": Figures(1.0, error, scale, 1.0)}


@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("beside", [0.0, 0.02])
def test_slack_times_the_other_and_the_floor_hold_and_more_does_not(dtype, beside):
    bound = SLACK * beside + FLOOR[dtype]
    assert verdicts(of_error(bound * 0.999), of_error(beside), ["a"], dtype)["a"]
    assert not verdicts(of_error(bound * 1.001), of_error(beside), ["a"], dtype)["a"]
    assert not verdicts(of_error(0.0, -bound * 1.001), of_error(beside, beside), ["a"], dtype)["a"]


def test_small_tensors_may_stray_by_chance_and_large_ones_may_not():
    def used(entries: int, error: float, scale: float) -> bool:
        found, beside = ({**of_error(0.0), "a": Figures(1.0, *pair, 1.0, entries)} for pair in ((error, scale), (0.01, 0.0)))
        return verdicts(found, beside, ["a"])["a"]

    assert used(16, 0.026, 0.0)
    assert not used(16, 0.027, 0.0)
    assert not used(10**6, 0.0151, 0.0)
    assert used(16, 0.01, 0.0112)
    assert not used(16, 0.01, 0.0114)
    assert not used(10**6, 0.01, 1e-4)


def test_what_is_not_a_number_fails():
    truth = {"a": [1.0, 2.0]}
    fine = measured(truth, truth)
    for bad in (measured({"a": [math.nan, 2.0]}, truth), measured({"a": [math.inf, 2.0]}, truth)):
        assert not verdicts(bad, fine, ["a"])["a"]
        assert not verdicts(bad, bad, ["a"])["a"], "though plain PyTorch's is none either"
    assert not verdicts(measured(truth, truth, math.nan), fine, ["a"])[LOSS]
    assert not verdicts(of_error(0.0, math.nan), of_error(0.0), ["a"])["a"]
    of_nan = measured(truth, {"a": [math.nan, 1.0]})
    assert not verdicts(of_nan, of_nan, ["a"])["a"]


def test_a_gradient_in_one_place_only_fails():
    truth = {"a": [1.0, 2.0], "b": [1.0, 0.0]}
    both, lacks = measured(truth, truth), measured({"a": [1.0, 2.0]}, truth)
    assert verdicts(lacks, both, ["a", "b"]) == {LOSS: True, ALL: False, "a": True, "b": False}
    assert not verdicts(both, lacks, ["a", "b"])["b"]
    more = measured(truth, {"a": [1.0, 2.0]})
    assert not verdicts(more, more, ["a"])["b"]


def test_a_gradient_that_is_zero_is_judged_by_the_others():
    truth = {"a": [3.0, 4.0], "b": [0.0, 0.0]}
    exact = measured(truth, truth)
    assert exact["b"] == Figures(0.0, 0.0, independent=2)
    assert verdicts(exact, exact, ["a", "b"])["b"]
    small, large = (measured({"a": [3.0, 4.0], "b": [0.0, 5 * share]}, truth) for share in (0.9e-5, 1.1e-5))
    assert small["b"].error == pytest.approx(0.9e-5)
    assert verdicts(small, exact, ["a", "b"])["b"]
    assert not verdicts(large, exact, ["a", "b"])["b"]
    noise = {"a": [3.0, 4.0], "b": [0.0, 4 * ZERO]}
    assert measured({"a": [3.0, 4.0], "b": [0.0, -4 * ZERO]}, noise)["b"].cosine is None


def test_kinds_of_parameters():
    assert kind_of("llm.model.layers.12.self_attn.q_proj.weight") == ("self_attn.q_proj", "12")
    assert kind_of("llm.model.layers.0.self_attn.q_proj.bias") == ("self_attn.q_proj.bias", "0")
    assert kind_of("llm.model.embed_tokens.weight") == ("embed_tokens", "")
    assert kind_of("llm.lm_head.weight") == ("lm_head", "")
    assert kind_of("projector.2.bias") == ("projector.2.bias", "")


KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def large(wrong: str | None) -> Certificate:
    """The certificate of a decoder of forty layers and five steps, in which the parameter `wrong` is off."""
    names = [f"llm.model.layers.{layer}.{kind}.{leaf}" for layer in range(40) for kind in KINDS for leaf in ("weight", "bias")]
    names += ["llm.model.embed_tokens.weight", "llm.lm_head.weight"]
    names += [f"projector.{2 * layer}.{leaf}" for layer in range(4) for leaf in ("weight", "bias")]
    fine = {LOSS: Figures(5.0, 1e-7), ALL: Figures(1.0, 1e-7)} | {name: Figures(1.0, 1e-6, 0.0, 1.0) for name in names}
    off = fine if wrong is None else fine | {wrong: Figures(1.0, math.nan, math.nan, math.nan)}
    figures = dict.fromkeys(VARIANTS, fine) | {"configured": off}
    judged = [each for step in range(5) for each in judge(step, figures, names, FP32)]
    counts = {"tokens": 9000, "supervised": 900, "images": 9, "micro_batches": 1}
    step = {"samples": 16, "of": 128, "from": 7, **counts, "seconds": {TRUTH: 1.0}}
    steps = [{"step": number, "ids": [f"record{i}" for i in range(16)], **step} for number in range(5)]
    facts = {
        "stage": "finetune",
        "device": "cpu",
        "precision": "fp32",
        "truth": "fp64",
        "padded_batch": 2,
        "settings": {"recompute": "none"},
        "kernels": {"attention": "varlen"},
        "lora": None,
        "model": {"llm": "a", "vision_tower": "b", "projector": "c", "trained": 7, "frozen": 3, "weights_sha256": "0" * 64},
        "data": {"records": "r.json", "prepared_digest": "1" * 64, "samples": 9},
        "config_sha256": "2" * 64,
        "versions": {"torch": "2", "machine": "m", "device": "d"},
        "commit": None,
    }
    return Certificate(facts, steps, [figures] * 5, judged)


@pytest.mark.parametrize("wrong", [None, "llm.model.layers.33.mlp.up_proj.bias"])
def test_the_page_is_one_page_for_any_model(wrong):
    certificate = large(wrong)
    page = list(lines(certificate))
    assert len(page) <= 65
    assert page[1] == page[-1] == certificate.verdict()
    assert page[1].startswith("HOLDS" if wrong is None else "FAILS in whole, kernels: ")
    (row,) = [line for line in page if line.startswith("mlp.up_proj.bias ")]
    assert (wrong is not None) == ("layer 33, step 0" in row and row.endswith("FAILS"))
    found = as_json(certificate)
    assert len(found["judged"]) == len(certificate.judged) == 5 * 4 * (2 + 40 * 14 + 10)
    assert found["holds"] is (wrong is None)
