"""transformers' modules made with our weights: nothing of their own but what they compute when they are made."""

import pytest
import torch
from torch import nn

from fastllava.model import hf_reference


def test_the_decoder_holds_our_tensors_and_makes_its_own_frequencies(tiny):
    model = tiny.load()
    weights = dict(model.named_parameters())
    decoder = hf_reference.decoder(model, weights.__getitem__, torch.float32)
    for name, parameter in decoder.named_parameters():
        assert parameter.data_ptr() == weights[f"llm.{name}"].data_ptr(), name
    (frequencies,) = (buffer for name, buffer in decoder.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    torch.testing.assert_close(frequencies, model.llm.config.inverse_frequencies())
    assert not any(tensor.is_meta for tensor in (*decoder.parameters(), *decoder.buffers()))


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_what_is_not_known_is_refused(kind):
    def make() -> nn.Module:
        module = nn.Module()
        module.lm_head = nn.Linear(2, 2, bias=False)
        if kind == "parameter":
            module.extra = nn.Linear(2, 2)
        else:
            module.lm_head.register_buffer("offset", torch.zeros(1))
        return module

    with pytest.raises(RuntimeError, match={"parameter": "has extra.weight, which is no weight", "buffer": "has a buffer offset"}[kind]):
        hf_reference.filled(make, lambda name: torch.ones(2, 2), "llm")
