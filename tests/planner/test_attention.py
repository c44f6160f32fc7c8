"""The price of attention: what was published comes out again, and what lies between and beyond it."""

import dataclasses

import numpy as np
import pytest

from fastllava.errors import UserError
from fastllava.planner.attention import PUBLISHED, implementation_of, reached, seconds
from fastllava.planner.gpus import GPUS, PRODUCT_SHARE
from fastllava.planner.sizes import SIZES

LLM = SIZES["7b"].llm
H100, H200, PCIE, A100 = (GPUS[name] for name in ("h100-80g", "h200", "h100-pcie", "a100-80g"))
# Of tritonbench 1267: 4 samples, 48 heads of 128, one layer; microseconds of FlashAttention 3 on an H100, forward and backward.
MEASURED = {1024: (141.63, 709.66), 2048: (368.35, 1631.26), 4096: (1236.90, 4643.46), 8192: (4817.44, 15308.16)}


@pytest.mark.parametrize("rows", MEASURED)
def test_published_times_come_out_again(rows: int) -> None:
    one_layer = dataclasses.replace(LLM, num_hidden_layers=1, num_attention_heads=48, head_dim=128)
    forward, backward = MEASURED[rows]
    given = one_layer, [rows] * 4, H100, "fa3"
    assert 1e6 * seconds(*given, backward=False) == pytest.approx(forward, rel=0.01)
    assert 1e6 * (seconds(*given) - seconds(*given, backward=False)) == pytest.approx(backward, rel=0.01)


def test_between_and_beyond_the_published_lengths() -> None:
    figures = {1024: 100.0, 4096: 300.0}
    found = reached(figures, np.array([256, 512, 1024, 2048, 4096, 16384]))
    assert found == pytest.approx([25, 50, 100, 200, 300, 300])
    # One long length alone says nothing of a fall before a block or two are wanted.
    assert reached({8192: 166.0}, np.array([512, 1024, 2048])) == pytest.approx([83, 166, 166])


def test_what_makes_it_slower() -> None:
    lengths = [300, 700, 1100, 2048]
    base = seconds(LLM, lengths, H200, "varlen")
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    at_peak = 14 * pairs * LLM.num_hidden_layers * LLM.num_attention_heads * LLM.head_dim / H200.peak
    assert base > 3 * at_peak / PRODUCT_SHARE, "attention of short samples is no large product"
    assert seconds(LLM, lengths, H200, "fa3") < 0.8 * base
    assert seconds(LLM, lengths, H200, "fa3") == seconds(LLM, lengths, H200, "fa4")
    assert seconds(LLM, lengths, H200, "fa3", one_order=True) > 1.1 * seconds(LLM, lengths, H200, "fa3")
    assert seconds(LLM, lengths, H200, "varlen", forwards=2) > base > seconds(LLM, lengths, H200, "varlen", backward=False)
    assert seconds(LLM, lengths, PCIE, "varlen") == pytest.approx(base * H200.peak / PCIE.peak)


def test_what_a_plan_counts_with() -> None:
    assert {(implementation_of("auto", gpu), gpu.generation) for gpu in GPUS.values()} <= PUBLISHED.keys()
    assert [implementation_of(name, H200) for name in ("auto", "varlen", "fa3", "fa4", "xformers", "reference")] == [
        *("varlen", "varlen", "fa3", "fa4", "varlen", "varlen"),
    ]
    with pytest.raises(
        UserError, match=r"kernels\.attention: 'fa3' cannot run on a100-80g, of compute capability 8\.x; write kernels.attention=v"
    ):
        implementation_of("fa3", A100)
    assert all(figures.source for figures in PUBLISHED.values())
