"""A batch whose indices lead nowhere: in words where the host can look, a loss of NaN where it cannot."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastllava.batch import Batch
from fastllava.errors import UserError
from fastllava.model import llava
from fastllava.model.build import rebuilt
from fastllava.model.indices import check_on_host

VOCABULARY = 100


def whole(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def batch() -> Batch:
    """Two samples of text, of 3 and 4 rows."""
    return Batch(
        token_ids=whole(1, 2, 3, 4, 5, 6, 7, dtype=torch.int64),
        position_ids=whole(0, 1, 2, 0, 1, 2, 3, dtype=torch.int64),
        cu_seqlens=whole(0, 3, 7),
        max_seqlen=4,
        pixels=torch.zeros(0, 3, 28, 28, dtype=torch.uint8),
        patch_rows=whole(),
        text_rows=whole(0, 1, 2, 3, 4, 5, 6),
        supervised_rows=whole(1, 5),
        targets=whole(3, 7, dtype=torch.int64),
        weights=torch.full((2,), 0.5),
    )


def with_token(value: int) -> Batch:
    ids = batch().token_ids.clone()
    ids[4] = value
    return replace(batch(), token_ids=ids)


WRONG = {
    "a token beyond the table": (with_token(VOCABULARY), r"model\.tokenizer: token id 100 has no row in the embedding of model\.llm"),
    "a token below the table": (with_token(-1), r"model\.tokenizer: token id -1"),
    "a token that narrows to one": (with_token(2**32 + 5), r"model\.tokenizer: token id 4294967301"),
    "an image's mark": (with_token(-200), r"data\.records: -200 marks an image and stands among the token ids"),
    "a label of -100": (
        replace(batch(), targets=whole(3, -100, dtype=torch.int64)),
        "label -100 has no row in the head",
    ),
    "a supervised row beyond": (replace(batch(), supervised_rows=whole(1, 7)), "a batch of 7 rows has 7 in its supervised_rows"),
    "a text row below": (replace(batch(), text_rows=whole(0, 1, 2, 3, 4, 5, -1)), "a batch of 7 rows has -1 in its text_rows"),
}


def test_a_good_batch_passes() -> None:
    check_on_host(batch(), VOCABULARY)
    check_on_host(replace(batch(), patch_rows=whole(7)), VOCABULARY)


@pytest.mark.parametrize("wrong", WRONG)
def test_on_the_host_it_is_an_error_in_words(wrong: str) -> None:
    given, words = WRONG[wrong]
    with pytest.raises(UserError, match=words):
        check_on_host(given, VOCABULARY)


BOUNDS = {
    "bounds beyond the rows": replace(batch(), cu_seqlens=whole(0, 3, 9)),
    "bounds that fall": replace(batch(), cu_seqlens=whole(0, 8, 7)),
    "a sample longer than it is said to be": replace(batch(), max_seqlen=3),
}


@pytest.mark.parametrize("rows", ["supervised", "all"])
@pytest.mark.parametrize("wrong", [*WRONG, *BOUNDS])
def test_where_the_host_cannot_look_the_loss_is_nan(tiny, monkeypatch: pytest.MonkeyPatch, wrong: str, rows: str) -> None:
    """The ops that a GPU would use, which read nothing on the host, say it in the loss."""
    monkeypatch.setattr(llava, "check_on_host", lambda *_: None)
    model = tiny.load(projector="fresh")
    model.tower.requires_grad_(False)
    model = rebuilt(model, replace(model.execution, last_layer=rows))
    vocabulary = model.llm.config.vocab_size
    assert model(batch()).isfinite()
    given = WRONG[wrong][0] if wrong in WRONG else BOUNDS[wrong]
    if wrong == "a token beyond the table":
        given = with_token(vocabulary)
    if wrong in ("bounds beyond the rows", "bounds that fall"):
        # The reference of attention reads them.
        with pytest.raises(ValueError, match="cu_seqlens rises from 0"):
            model(given)
        return
    assert model(given).isnan()
