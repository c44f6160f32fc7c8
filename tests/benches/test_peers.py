"""`fastllava bench peers` on tiny models: every variant gives our loss and gradient, rows are whole, what is wrong has no time."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benches import cli
from benches.lib import ours, results, trials
from benches.lib import rows as rows_of
from benches.lib.request import Request
from benches.lib.results import Sheet
from benches.peers import compare as peers
from benches.peers import original, training
from benches.peers import transformers as patching
from fastllava.errors import UserError
from fastllava.planner.sizes import SIZES

CPU = torch.device("cpu")
RUNNABLE = {"original", "transformers", "transformers_recompute", "fastllava"}
SAMPLES = 4

TIMES = {
    *("samples_per_second", "tokens_per_second", "ceiling_share", "step_ms_p20", "step_ms_p50", "step_ms_p80", "peak_bytes"),
    *("times_original_p20", "times_original_p50", "times_original_p80", "hardware_flops", "padding_share"),
}
KEYS = TIMES | {
    *("variant", "stage", "size", "mfu", "hfu", "device", "versions", "commit", "dirty", "driver", "power_limit_watts"),
    *("layers", "dtype", "samples_per_step", "turns", "model_flops", "matmul_ceiling_tflops", "loss", "grad_norm", "error"),
    *("micro_batch", "attention", "micro_batch_tokens", "recompute", "last_layer", "compile", "kernels", "void"),
}


def comparison(**changes: Any) -> Any:
    return Request(CPU, **{"sizes": ["tiny"], "stages": ["pretrain"], "samples": SAMPLES, "seconds": 0.0} | changes)


def measure(variants: list[str] | None = None, **changes: Any) -> list[dict[str, Any]]:
    """The rows of these variants, of all when none is given."""
    return peers.bench(comparison(**changes), Sheet(), variants or list(peers.VARIANTS))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The rows of every variant in both stages, and the file that they were appended to."""
    out = tmp_path_factory.mktemp("bench") / "deep" / "rows.jsonl"
    return peers.bench(comparison(stages=["pretrain", "finetune"]), Sheet(out), list(peers.VARIANTS)), out


def test_rows_are_whole(measured) -> None:
    rows, out = measured
    assert [(row["stage"], row["variant"]) for row in rows] == [(s, v) for s in ("pretrain", "finetune") for v in peers.VARIANTS]
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    for row in rows:
        assert set(row) == KEYS
        assert row["device"].startswith("CPU ")
        assert row["versions"]["torch"] == importlib.metadata.version("torch")
        # The peak of a CPU is not known.
        assert row["mfu"] is None
        assert row["hfu"] is None
        if row["variant"] not in RUNNABLE:
            assert row["void"].startswith("cannot run here: ")
            assert all(row[key] is None for key in TIMES)
            continue
        assert row["void"] is None
        assert row["turns"] == trials.FEWEST
        assert 0 < row["step_ms_p20"] <= row["step_ms_p50"] <= row["step_ms_p80"]
        assert row["samples_per_second"] > 0
        assert row["ceiling_share"] > 0
        assert row["model_flops"] <= row["hardware_flops"]
        assert row["samples_per_step"] == SAMPLES
    assert results.failures(rows) == []


def test_all_variants_have_one_loss_and_gradient(measured) -> None:
    for stage in ("pretrain", "finetune"):
        found = [row for row in measured[0] if row["stage"] == stage and row["void"] is None]
        assert {row["variant"] for row in found} == RUNNABLE
        assert [row["loss"] for row in found] == pytest.approx([found[0]["loss"]] * len(found), rel=1e-6)
        assert [row["grad_norm"] for row in found] == pytest.approx([found[0]["grad_norm"]] * len(found), rel=1e-5)
        assert all(row["error"] < 1e-6 for row in found)


def test_all_variants_train_the_same_adapters() -> None:
    """transformers' by PEFT; values of A and B are those of ours, and nothing is dropped."""
    pytest.importorskip("peft", reason="peft is not installed")
    words = ["lora.rank=4", "lora.dropout=0", "lora.targets=[q_proj,down_proj]"]
    rows = measure(["original", "transformers", "fastllava"], stages=["finetune"], overrides=words)
    assert [row["void"] for row in rows] == [None] * 3
    whole = measure(["fastllava"], stages=["finetune"])[0]
    for row in rows:
        assert row["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(rows[-1]["grad_norm"], rel=1e-4)
        # The whole decoder's would be far larger.
        assert row["grad_norm"] < 0.9 * whole["grad_norm"]
    assert rows[-1]["model_flops"] < whole["model_flops"]


def test_weights_that_are_quantised_are_not_compared() -> None:
    with pytest.raises(UserError, match=r"model\.quantize: nf4, and the peers share weights as they are; leave it out"):
        measure(["fastllava"], stages=["finetune"], overrides=["lora.rank=4", "model.quantize=nf4"])


def test_only_ours_has_no_padding_and_no_idle_work(measured) -> None:
    for row in (row for row in measured[0] if row["void"] is None):
        mine = row["variant"] == "fastllava"
        assert (row["padding_share"] == 0) is mine
        assert (row["hardware_flops"] < 1.1 * row["model_flops"]) is mine
        assert (row["micro_batch"] is None) is mine
        assert (row["kernels"] is None) is not mine
    stages = {row["stage"]: row["times_original_p50"] for row in measured[0] if row["variant"] == "original"}
    assert stages == {"pretrain": 1.0, "finetune": 1.0}


def test_the_original_computes_what_its_recipe_computes() -> None:
    """Padded rows, every block, an image for each sample, logits of every row, the decoder's forward pass twice."""
    run = ours.plan_run("finetune", SIZES["tiny"], {"precision": "fp32", "reference_micro_batch": 2}, per_step=4)
    mine = ours.Fastllava(run, CPU)
    peer = original.Original(run, mine, training.Shared.of(mine), 2)
    step = next(step for step in map(run.step, range(run.n_steps)) if not run.samples.n_images[step.samples].any())
    lengths = run.samples.n_tokens[step.samples]
    assert peer.rows(step) == 2 * max(lengths[:2]) + 2 * max(lengths[2:])
    assert peer.images(step) == 4
    assert all(len(batch["padded"].pixels) == 2 and not batch["padded"].pixels.any() for batch in peer.batches(step))
    done, needed = peer.hardware_flops(step), run.accounting.model_flops(run.work(step))
    assert needed.tower == 0 < done.tower
    assert done.decoder > 1.2 * needed.decoder * peer.rows(step) / lengths.sum()
    seen: list[tuple[int, ...]] = []
    block = peer.plain.tower.get_submodule(next(name for name, _ in peer.plain.tower.named_modules() if name.endswith("encoder.layers.2")))
    block.register_forward_hook(lambda module, args, out: seen.append((out[0] if isinstance(out, tuple) else out).shape))
    logits: list[torch.Size] = []
    peer.plain.llm.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.shape))
    layers: list[int] = []
    peer.plain.llm.model.layers[0].mlp.register_forward_hook(lambda module, args, out: layers.append(1))
    peer.step(peer.batches(step))
    assert [shape[0] for shape in seen] == [2, 2]
    assert [shape[0] * shape[1] for shape in logits] == [2 * max(lengths[:2]), 2 * max(lengths[2:])]
    assert len(layers) == 4


class Shifted(original.Original):
    """Its labels are one token off."""

    def collate(self, samples: Any) -> Any:
        batch = super().collate(samples)
        return batch | {"padded": dataclasses.replace(batch["padded"], labels=[labels.roll(1) for labels in batch["padded"].labels])}


class Broken(original.Original):
    """Cannot take a step."""

    def loss(self, batch: Any, supervised: int) -> torch.Tensor:
        raise RuntimeError("no such kernel\nmore")


def with_another(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[str]:
    """Names of variants, one of them a `kind`."""
    known = {**peers.VARIANTS, "other": peers.Variant("of this test", kind, recomputes=True)}
    monkeypatch.setattr(peers, "VARIANTS", known)
    monkeypatch.setattr(peers, "measure_matmul", lambda *_: 0.1)
    return ["transformers", "other", "fastllava"]


def test_a_variant_with_another_loss_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["variant"]: row for row in measure(with_another(monkeypatch, Shifted))}
    assert rows["other"]["void"].startswith("wrong: loss ")
    assert all(rows["other"][key] is None for key in TIMES)
    assert rows["other"]["loss"] is not None
    assert rows["fastllava"]["void"] is rows["transformers"]["void"] is None
    assert [row["variant"] for row in results.failures(list(rows.values()))] == ["other"]


def test_a_variant_that_breaks_leaves_the_others_alone_and_the_command_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = with_another(monkeypatch, Broken)
    out = tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--sizes", "tiny", "--stages", "pretrain", "--samples", "2", "--seconds", "0", "--out", str(out)]
    result = CliRunner().invoke(cli.app, ["peers", *options, "--variants", ",".join(names[1:])])
    assert result.exit_code == 1, result.output
    found = {row["variant"]: row for row in results.latest(out, ["variant"])}
    assert found["other"]["void"] == "broke: RuntimeError: no such kernel"
    assert found["fastllava"]["void"] is None
    result = CliRunner().invoke(cli.app, ["peers", *options, "--variants", "fastllava"])
    assert result.exit_code == 0, result.output
    assert "tiny pretrain fastllava: " in result.output


class NotFinite(original.Original):
    """Its gradient is not a number."""

    def loss(self, batch: Any, supervised: int) -> torch.Tensor:
        return super().loss(batch, supervised) * float("nan")


def test_what_is_not_finite_does_not_reach_the_weights_that_all_share(monkeypatch: pytest.MonkeyPatch) -> None:
    names = with_another(monkeypatch, NotFinite)
    rows = {row["variant"]: row for row in measure(names, stages=["finetune"])}
    assert rows["other"]["void"].startswith("wrong: loss nan")
    assert rows["other"]["loss"] is rows["other"]["grad_norm"] is None
    assert rows["transformers"]["void"] is rows["fastllava"]["void"] is None
    assert rows["transformers"]["loss"] == pytest.approx(rows["fastllava"]["loss"], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_variants_keep_one_copy_of_what_trains(precision: str) -> None:
    run = ours.plan_run("finetune", SIZES["tiny"], {"precision": precision}, per_step=2)
    mine = ours.Fastllava(run, CPU)
    shared = training.Shared.of(mine)
    one, other = (original.Original(run, mine, shared, 2) for _ in range(2))
    for first, second in zip(one.parameters, other.parameters, strict=True):
        assert first is not second
        assert first.data_ptr() == second.data_ptr()
    places = {parameter.data_ptr() for parameter in mine.trained.values()}
    assert {master.data_ptr() for master in one.optimizer.masters} == places
    moments = {state["exp_avg"].data_ptr() for state in mine.optimizer.state.values()}
    assert {state["exp_avg"].data_ptr() for state in one.optimizer.adamw.state.values()} == moments
    # Each is counted as if it were alone: in bf16 weights of 2 bytes and masters of 4, in fp32 the weights are the masters.
    trained = sum(parameter.numel() for parameter in mine.trained.values())
    frozen = sum(each.nbytes for name, each in shared.weights.items() if name not in mine.trained)
    counted = one.state_bytes() - frozen - (14 if precision == "bf16" else 12) * trained
    assert 0 <= counted < 0.02 * one.state_bytes()
    before = [parameter.clone() for parameter in mine.trained.values()]
    one.step(one.batches(run.step(0)))
    assert all(torch.equal(a, b) for a, b in zip(before, mine.trained.values(), strict=True))
    assert all(parameter.grad is None for parameter in (*mine.trained.values(), *one.parameters))
    lose, calls = one.loss, iter(range(2))

    def second_fails(batch: Any, supervised: int) -> torch.Tensor:
        if next(calls):
            raise RuntimeError("the second micro-batch")
        return lose(batch, supervised)

    one.loss, one.micro_batch = second_fails, 1
    with pytest.raises(RuntimeError, match="the second micro-batch"):
        one.step(one.batches(run.step(0)))
    assert all(parameter.grad is None for parameter in (*mine.trained.values(), *one.parameters))


def test_agreement_is_with_the_median() -> None:
    def trial(loss: float, norm: float = 1.0) -> Any:
        return trials.Trial(trainer=object(), loss=loss, norm=norm)

    found = {"e": trial(float("nan")), "a": trial(2.0), "b": trial(2.0 + 1e-6), "c": trial(2.001), "d": trial(2.0, 1.1), "f": trial(2.0)}
    trials.agree(found, torch.float32)
    assert [name for name, each in found.items() if each.void] == ["e", "c", "d"]
    assert "gradient norm" in found["d"].void
    turning = {
        name: trials.Trial(trainer=object(), loss=2.0, norm=1.0, losses=[2.0, last]) for name, last in (("a", 2.0), ("b", 2.0), ("c", 2.1))
    }
    trials.agree(turning, torch.float32)
    assert [name for name, each in turning.items() if each.void] == ["c"]


def test_memory_that_is_short_halves_the_micro_batch() -> None:
    class Greedy:
        micro_batch = 8
        dropped = 0

        def batches(self, step: Any) -> list[int]:
            return [self.micro_batch]

        def step(self, batches: list[int], judged: bool) -> Any:
            if batches[0] > 2:
                raise torch.OutOfMemoryError("no memory")
            return training.DeviceScalars(torch.tensor(1.0), torch.tensor(2.0))

        def state_bytes(self) -> int:
            return 10

        def drop_gradients(self) -> None:
            self.dropped += 1

    trial = trials.Trial(trainer=Greedy())
    trials.judge_alone(trial, None, CPU)
    assert (trial.trainer.micro_batch, trial.trainer.dropped) == (2, 2)
    assert (trial.loss, trial.norm) == (1.0, 2.0)
    assert trial.peak >= 10


@pytest.mark.parametrize("whose", ["ours", "all"])
def test_without_memory_for_the_weights_every_row_says_so(monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(*((peers, "Fastllava") if whose == "ours" else (peers.Shared, "of")), none_left)
    monkeypatch.setattr(peers, "measure_matmul", lambda *_: 0.1)
    rows = measure()
    assert {row["variant"]: row["void"].partition(",")[0] for row in rows} == {
        name: "cannot run here: Liger's kernels need a CUDA GPU" if name == "transformers_liger" else "out of memory"
        for name in peers.VARIANTS
    }
    assert all(set(row) == KEYS for row in rows)
    assert results.failures(rows) == []


def test_ligers_patch_is_in_place_for_its_steps_only() -> None:
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    rotate, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    run = ours.plan_run("pretrain", SIZES["tiny"], {"precision": "fp32"}, per_step=2)
    mine = ours.Fastllava(run, CPU)
    peer = patching.TransformersLiger(run, mine, training.Shared.of(mine), 2)
    assert modeling_llama.apply_rotary_pos_emb is rotate
    assert modeling_llama.LlamaRMSNorm is norm
    changed = {name for owner, name, _, _ in peer._changes if owner is modeling_llama}
    assert "apply_rotary_pos_emb" in changed
    with patching.patched(peer._changes):
        assert modeling_llama.apply_rotary_pos_emb is not rotate
    assert modeling_llama.apply_rotary_pos_emb is rotate
    with pytest.raises(ZeroDivisionError), patching.patched(peer._changes):
        raise ZeroDivisionError
    assert modeling_llama.apply_rotary_pos_emb is rotate


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": ["70b"]}, "--sizes: '70b' is none of 7b, 13b, 1.1b, 150m, tiny"),
        ({"stages": ["align"]}, "--stages: 'align' is none of pretrain, finetune"),
        ({"variants": ["theirs"]}, "--variants: 'theirs' is none of original, transformers, "),
        ({"layers": 3}, "--layers: 3, but the decoder has 2; write 1 to that"),
        ({"overrides": ["train.compil=off"]}, "train.compil: "),
    ],
)
def test_unknown_names_are_the_users_mistake(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        measure(**changes)
    assert said in str(error.value)


def test_weights_in_bf16_have_masters() -> None:
    weight = torch.nn.Parameter(torch.full((8,), 1.0, dtype=torch.bfloat16))
    adamw = training.MasterAdamW([weight], {})
    adamw.adamw.param_groups[0]["lr"] = 1e-4
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        adamw.step()
    # A single step is less than half the distance between two bf16 numbers here.
    assert weight.dtype == torch.bfloat16
    assert adamw.masters[0].tolist() == pytest.approx([1.0 - 40e-4] * 8, abs=1e-5)
    assert weight.float().tolist() == pytest.approx([1.0 - 40e-4] * 8, abs=4e-3)
    assert weight.float().max() < 1.0
    assert weight.grad is None


def test_fewer_layers_are_said_in_the_row() -> None:
    size = SIZES["7b"].with_layers(4)
    run = ours.plan_run("finetune", size, {"precision": "bf16"}, per_step=16)
    assert rows_of.setting(run, "7b")["layers"] == 4
    assert dataclasses.asdict(size.llm) == dataclasses.asdict(SIZES["7b"].llm) | {"num_hidden_layers": 4}
