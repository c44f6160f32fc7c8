"""ALiBi as columns: the slopes of transformers, and biases that no dtype rounds, in every implementation of attention."""

import math

import pytest
import torch

from fastllava.model.alibi import COLUMNS, LONGEST, columns_of_keys, columns_of_queries, slopes
from fastllava_kernels import rooms


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 12, 20, 32, 40, 71])
def test_slopes_are_those_of_transformers(heads):
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    expected = build_mpt_alibi_tensor(heads, 2)
    # The row before the last of two.
    assert torch.equal(slopes(heads), -expected[:, 0, 0])


def test_slopes_of_a_power_of_2_are_a_geometric_series():
    assert torch.allclose(slopes(8), 2.0 ** -torch.arange(1, 9))
    assert slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_bias_is_exact_to_fp32_in_every_dtype(dtype):
    scaled = slopes(12).double() * math.sqrt(136)
    positions = torch.tensor([0, 1, 255, 256, 257, 2047, 4095, 65279, LONGEST - 1])
    keys = columns_of_keys(positions, dtype)
    assert keys.dtype == dtype
    assert keys.shape == (len(positions), COLUMNS)
    assert torch.equal(keys[:, 0].long() + keys[:, -3].long(), positions), "the digits are whole"
    found = columns_of_queries(scaled, dtype).double() @ keys.double().T
    torch.testing.assert_close(found, scaled[:, None] * positions.double(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("name", list(rooms()["attention"].implementations))
def test_every_implementation_of_attention_computes_the_bias(name):
    """Forward and gradients of packed samples, against scores with the bias added, in fp64."""
    torch.manual_seed(0)
    heads, width, lengths = 6, 8, [5, 1, 40]
    given = [torch.randn(sum(lengths), heads, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    outs = []
    for q, k, v in zip(*(x.split(lengths) for x in given), strict=True):
        rows = torch.arange(len(q))
        bias = slopes(heads).double()[:, None, None] * (rows[None, :] - rows[:, None])
        scores = torch.einsum("ihk,jhk->hij", q, k) / math.sqrt(width) + bias
        shares = scores.masked_fill(rows[None, :] > rows[:, None], -math.inf).softmax(-1)
        outs.append(torch.einsum("hij,jhk->ihk", shares, v))
    expected = torch.cat(outs)
    wanted = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, given, wanted)

    q, k, v = given
    whole = width + COLUMNS
    of_heads = columns_of_queries(slopes(heads).double() * math.sqrt(whole), q.dtype)
    q = torch.cat((q * math.sqrt(whole / width), of_heads.expand(len(q), -1, -1)), dim=-1)
    k = torch.cat((k, columns_of_keys(positions, k.dtype).unsqueeze(1).expand(-1, heads, -1)), dim=-1)
    v = torch.nn.functional.pad(v, (0, COLUMNS))
    cu_seqlens = torch.tensor([0, 5, 6, 46], dtype=torch.int32)
    found = rooms()["attention"].implementations[name].function(q, k, v, cu_seqlens, 40, True)[..., :width]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, given, wanted), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
