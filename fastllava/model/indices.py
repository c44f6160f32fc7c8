"""Indices of a batch on the CPU, looked at in words before an op makes NaN of them."""

from typing import Any

from torch import Tensor

from fastllava.batch import IMAGE_ID, Batch
from fastllava.errors import UserError


def check_on_host(batch: Batch, vocabulary: int) -> None:
    """Raises UserError for a token without a row in the embedding or the head, and for a list of rows that leaves the batch.

    Looks at batches on the CPU alone: to read a GPU's numbers the host would have to wait, and there the loss is NaN. The tensors
    of a dry run, which are of a class of their own, hold no numbers.
    """
    if batch.token_ids.device.type != "cpu" or type(batch.token_ids) is not Tensor:
        return
    rows = len(batch.token_ids)
    for name, limit in (("text_rows", rows), ("patch_rows", rows + 1), ("supervised_rows", rows)):
        if (found := _outside(getattr(batch, name), limit)) is not None:
            raise UserError(f"a batch of {rows} rows has {found[1]} in its {name}; prepare the data anew: delete data.prepared_dir")
    ids = batch.token_ids.numpy()[batch.text_rows.numpy()]
    for name, what, values in (("embedding", "token id", ids), ("head", "label", batch.targets.numpy())):
        if (found := _outside(values, vocabulary)) is None:
            continue
        if found[1] == IMAGE_ID:
            raise UserError(f"data.records: {IMAGE_ID} marks an image and stands among the {what}s; images are spliced in by their rows")
        raise UserError(
            f"model.tokenizer: {what} {found[1]} has no row in the {name} of model.llm, which has {vocabulary}; give the tokenizer that "
            "belongs to model.llm"
        )


def _outside(values: Any, limit: int) -> tuple[int, int] | None:
    """(place, value) of the first that is not in 0 to limit - 1. By NumPy: what PyTorch counts are waits for a device."""
    values = values.numpy() if isinstance(values, Tensor) else values
    wrong = (values < 0) | (values >= limit)
    if not wrong.any():
        return None
    place = int(wrong.argmax())
    return place, int(values[place])
