"""The figures of steps and runs, by hand."""

import numpy as np
import pytest
import torch

from fastllava.config import check_config
from fastllava.data.plan import Plan, SampleLengths
from fastllava.model.llama import LlamaConfig
from fastllava.model.towers import ClipConfig
from fastllava.train.metrics.flops import Accounting, Work
from fastllava.train.metrics.throughput import Throughput, run_figures

LLAMA = LlamaConfig(
    vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=4,
    rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False, output_bias=False, mlp_bias=False, tied=False, window=None,
)  # fmt: skip
CLIP = ClipConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)


def make(world, peak, n=6):
    rows, images = np.arange(10, 10 + n, dtype=np.int32), np.arange(n, dtype=np.int8) % 2
    config = check_config(
        {
            "stage": "finetune",
            "output_dir": "o",
            "model": {"llm": "l"},
            "data": {"records": "r", "shuffle": False},
            "train": {"global_batch": 4, "reference_micro_batch": 2, "micro_batch_tokens": 1000},
        }
    )
    accounting = Accounting(LLAMA, CLIP, 1, 4 * 2.0 * (2 * 64 + 3 * 64), "finetune")
    lengths = SampleLengths(rows, np.full(n, 3, np.int32), images, np.where(images, 1, -1).astype(np.int32))
    return Throughput(Plan(lengths, config.data, config.train, accounting.cost(), world), accounting, peak)


def test_a_step_by_hand():
    throughput = make(world=1, peak=None)
    figures = throughput.step(throughput.plan.step(0), seconds=0.5, waited=0.1)
    work = Work.of([10, 11, 12, 13], [0, 1, 0, 1], [3, 3, 3, 3])
    assert figures == {
        "samples": 4,
        "tokens": 46,
        "supervised_tokens": 12,
        "micro_batches": 1,
        "padding_share": 0.0,
        "model_flops": throughput.accounting.model_flops(work).total,
        "hardware_flops": throughput.accounting.hardware_flops(work).total,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.1,
        "samples_per_second": 8.0,
        "tokens_per_second": 92.0,
    }


def test_ranks_without_a_sample_are_padding():
    throughput = make(world=8, peak=None)
    figures = throughput.step(throughput.plan.step(1), seconds=1.0, waited=0.0)
    assert figures["samples"] == 2
    assert figures["padding_share"] == pytest.approx(6 / (14 + 15 + 6))


def test_utilisation_is_of_the_peak_of_all_gpus():
    one, two = make(world=1, peak=1e6), make(world=2, peak=1e6)
    alone, shared = (throughput.step(throughput.plan.step(0), seconds=2.0, waited=0.5) for throughput in (one, two))
    assert alone["mfu"] == pytest.approx(alone["model_flops"] / 2e6)
    assert alone["hfu"] == pytest.approx(alone["hardware_flops"] / 2e6)
    assert shared["mfu"] == pytest.approx(alone["mfu"] / 2)


def test_a_cpu_and_an_unlisted_gpu_have_no_utilisation():
    throughput = make(world=1, peak=None)
    assert Throughput.of(throughput.plan, throughput.accounting, torch.device("cpu")).peak is None
    assert not {"mfu", "hfu"} & throughput.step(throughput.plan.step(0), 1.0, 0.0).keys()


def test_a_run_by_hand():
    base = {"samples": 4, "tokens": 40, "supervised_tokens": 8, "data_wait_seconds": 0.5}
    rows = [
        {"step": 0, **base, "step_seconds": 1.0, "mfu": 0.6, "hfu": 0.7, "peak_memory_bytes": 5},
        {"step": 1, **base, "step_seconds": 3.0, "mfu": 0.2, "hfu": 0.3, "peak_memory_bytes": 9},
    ]
    # The process that ends the run began at step 1, so step 0 counts in its sums and not in its goodput.
    assert run_figures(rows, first_step=1, wall_seconds=10.0) == {
        "samples": 8,
        "tokens": 80,
        "supervised_tokens": 16,
        "step_seconds": 4.0,
        "samples_per_second": 2.0,
        "tokens_per_second": 20.0,
        "data_wait_share": 0.25,
        "wall_seconds": 10.0,
        "goodput": 0.25,
        "mfu": pytest.approx(0.3),
        "hfu": pytest.approx(0.4),
        "peak_memory_bytes": 9,
    }


def test_a_run_without_a_step():
    figures = run_figures([], first_step=0, wall_seconds=1.0)
    assert figures["samples_per_second"] is None
    assert figures["goodput"] == 0
    assert "mfu" not in figures
