"""Triton kernels that move whole rows: to their places, back from them, and summed by key. Memory-bound, no atomics.

The rooms with a splice launch them under their own names.
T rows of hidden states, P patches, D columns, V rows of the embedding table, B blocks of rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllava_kernels import indices
from fastllava_kernels._device.launch import cdiv, inner_contiguous, on_device_of
from fastllava_kernels._tuning import tuning


@triton.jit(do_not_specialize=["rows_in", "rows_out"])
def copy_rows_kernel(
    source_ptr,
    places_ptr,
    ids_ptr,
    out_ptr,
    rows_in,
    rows_out,
    columns,
    source_stride,
    out_stride,
    LOOKUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write out[places[i]] = source[i], or with LOOKUP source[ids[places[i]]], NaN where that is no row of source.

    Nothing where places[i] is no row of out.
    """
    i = tl.program_id(0)
    place = tl.load(places_ptr + i).to(tl.int64)
    kept = (place >= 0) & (place < rows_out)
    if LOOKUP:
        origin = tl.load(ids_ptr + place, mask=kept, other=0).to(tl.int64)
    else:
        origin = i.to(tl.int64)
    known = (origin >= 0) & (origin < rows_in)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < tl.where(kept, columns, 0)
    readable = d < tl.where(kept & known, columns, 0)
    row = tl.load(source_ptr + origin * source_stride + d, mask=readable, other=float("nan"))
    tl.store(out_ptr + place * out_stride + d, row.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "rows_in"])
def gather_rows_kernel(
    source_ptr,
    places_ptr,
    out_ptr,
    partial_ptr,
    count,
    rows_in,
    columns,
    source_stride,
    SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write out[i] = source[places[i]], zeros where that is no row of source; SUM: the fp32 sums over each block of rows."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.load(places_ptr + i, mask=i < count, other=rows_in).to(tl.int64)
    inside = d[None, :] < columns
    kept = ((place >= 0) & (place < rows_in))[:, None] & inside
    tile = tl.load(source_ptr + place[:, None] * source_stride + d[None, :], mask=kept, other=0.0)
    tl.store(out_ptr + i.to(tl.int64)[:, None] * columns + d[None, :], tile, mask=(i < count)[:, None] & inside)
    if SUM:
        sums = tl.sum(tile.to(tl.float32), axis=0)
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * columns + d, sums, mask=d < columns)


@triton.jit(do_not_specialize=["count", "rows_in", "rows_out"])
def segment_sum_kernel(
    source_ptr,
    keys_ptr,
    rows_ptr,
    out_ptr,
    count,
    rows_in,
    rows_out,
    columns,
    source_stride,
    out_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write out[key] = sum of source[rows[i]] over the i with keys[i] == key, in their order; keys are sorted.

    The program of a key's first position does the work, the others of that key leave. Nothing is written for a key that is no
    row of out, and nothing read for a row that is none of source.
    """
    first = tl.program_id(0)
    key = tl.load(keys_ptr + first)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    if (before != key) & (key >= 0) & (key < rows_out):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
        start = first
        more = before != key
        while more:
            i = start + tl.arange(0, BLOCK_ROWS)
            same = tl.load(keys_ptr + i, mask=i < count, other=-1) == key
            row = tl.load(rows_ptr + i, mask=same, other=0).to(tl.int64)
            inside = (same & (row >= 0) & (row < rows_in))[:, None] & (d < columns)[None, :]
            tile = tl.load(source_ptr + row[:, None] * source_stride + d[None, :], mask=inside, other=0.0)
            sums += tl.sum(tile.to(tl.float32), axis=0)
            start += BLOCK_ROWS
            more = tl.load(keys_ptr + start, mask=start < count, other=-1) == key
        tl.store(out_ptr + key.to(tl.int64) * out_stride + d, sums.to(out_ptr.dtype.element_ty), mask=d < columns)


class RowKernels:
    """The kernels of a room that moves rows: `kernels` by name, and what launches each."""

    def __init__(self, room: str, names: Sequence[str]) -> None:
        self._room = room
        self.kernels = tuning.by_name(_described(f"{room}.{name}", *_VARIANTS[name]) for name in names)

    def scatter_rows(self, source_PD: Tensor, places_P: Tensor, out_TD: Tensor) -> None:
        """Write out[places[p]] = source[p]; p is left out where places[p] is no row of out, such as T."""
        self._copy("scatter", inner_contiguous(source_PD), places_P, None, out_TD)

    def embed_rows(self, table_VD: Tensor, ids_T: Tensor, places: Tensor, out_TD: Tensor) -> None:
        """Write out[t] = table[ids[t]] for every t in `places`, rounded to out's dtype; NaN for an id outside the table."""
        name = "embed" if table_VD.dtype == out_TD.dtype else "embed_master"
        self._copy(name, inner_contiguous(table_VD), places, ids_T, out_TD)

    def _copy(self, name: str, source: Tensor, places: Tensor, ids: Tensor | None, out: Tensor) -> None:
        if not len(places):
            return
        places, ids = places.contiguous(), None if ids is None else ids.contiguous()
        config = self._config(name, len(places), out)
        constants: dict[str, Any] = config | {"LOOKUP": ids is not None}
        grid = len(places), cdiv(out.shape[1], config["BLOCK_D"])
        with on_device_of(out):
            copy_rows_kernel[grid](
                source, places, places if ids is None else ids, out,
                source.shape[0], out.shape[0], out.shape[1], source.stride(0), out.stride(0),
                **constants,
            )  # fmt: skip

    def gather_rows(self, source_TD: Tensor, places_P: Tensor, want_sum: bool) -> tuple[Tensor, Tensor]:
        """Gather source[places] [P, D], zeros where that is no row of source, such as T; and its fp32 column sums [D], if `want_sum`."""
        source, count, columns = inner_contiguous(source_TD), len(places_P), source_TD.shape[1]
        config = self._config("gather_sum" if want_sum else "gather", count, source)
        constants: dict[str, Any] = config | {"SUM": want_sum}
        blocks = cdiv(count, config["BLOCK_ROWS"])
        out_PD = source.new_empty(count, columns)
        partial_BD = source.new_empty((blocks, columns) if want_sum else (0,), dtype=torch.float32)
        if count:
            with on_device_of(source):
                gather_rows_kernel[blocks, cdiv(columns, config["BLOCK_D"])](
                    source, places_P.contiguous(), out_PD, partial_BD, count, source.shape[0], columns, source.stride(0), **constants
                )
        return out_PD, partial_BD.sum(0) if want_sum else partial_BD

    def embedding_gradient(self, d_hidden_TD: Tensor, table_VD: Tensor, ids_T: Tensor, places: Tensor) -> Tensor:
        """Sum for each token d_hidden over the rows in `places` that hold it: [V, D] in the table's dtype.

        Summed in fp32 in the order of `places`, so the same bits every time: a stable sort by token, then one sum a token. A place
        outside the rows and a token outside the table count nowhere.
        """
        gradient_VD = torch.zeros_like(table_VD, memory_format=torch.contiguous_format)
        if not len(places):
            return gradient_VD
        source = inner_contiguous(d_hidden_TD)
        tokens = ids_T.index_select(0, indices.or_else(places, len(ids_T), 0))
        keys, order = torch.sort(torch.where(indices.inside(places, len(ids_T)), tokens, len(table_VD)), stable=True)
        config = self._config("segment_sum", len(places), source)
        with on_device_of(source):
            segment_sum_kernel[len(places), cdiv(source.shape[1], config["BLOCK_D"])](
                source, keys, places.index_select(0, order), gradient_VD,
                len(places), source.shape[0], len(gradient_VD), source.shape[1], source.stride(0), gradient_VD.stride(0),
                **config,
            )  # fmt: skip
        return gradient_VD

    def _config(self, name: str, rows: int, x: Tensor) -> dict[str, Any]:
        return tuning.config(self.kernels[f"{self._room}.{name}"], rows, x.device)


def _block(width: int, warps: int, rows: int | None = None) -> Mapping[str, int]:
    return ({} if rows is None else {"BLOCK_ROWS": rows}) | {"BLOCK_D": width, "num_warps": warps, "num_stages": 1}


_COPY = [_block(4096, 8), _block(2048, 4), _block(1024, 4)], _block(16, 4)
_GATHER = [_block(256, 8, 32), _block(512, 8, 16), _block(128, 4, 64)], _block(16, 4, 16)
_SEGMENT = [_block(512, 4, 16), _block(256, 4, 16), _block(1024, 8, 16)], _block(16, 4, 16)
"""Candidates for a GPU, and the interpreter's configuration."""


def _copy_signature(source: str, ids: str) -> Mapping[str, str]:
    sizes = dict.fromkeys(("rows_in", "rows_out", "columns", "source_stride", "out_stride"), "i32")
    return {"source_ptr": source, "places_ptr": "*i32", "ids_ptr": ids, "out_ptr": "*bf16", **sizes}


_GATHER_SIGNATURE = {
    "source_ptr": "*bf16",
    "places_ptr": "*i32",
    "out_ptr": "*bf16",
    "partial_ptr": "*fp32",
    **dict.fromkeys(("count", "rows_in", "columns", "source_stride"), "i32"),
}
_SEGMENT_SIGNATURE = {
    "source_ptr": "*bf16",
    "keys_ptr": "*i64",
    "rows_ptr": "*i32",
    "out_ptr": "*fp32",
    **dict.fromkeys(("count", "rows_in", "rows_out", "columns", "source_stride", "out_stride"), "i32"),
}
_VARIANTS: Mapping[str, tuple[Any, Mapping[str, str], Mapping[str, Any], tuple[Sequence[tuning.Config], tuning.Config]]] = {
    "scatter": (copy_rows_kernel, _copy_signature("*bf16", "*i32"), {"LOOKUP": False}, _COPY),
    "embed": (copy_rows_kernel, _copy_signature("*bf16", "*i64"), {"LOOKUP": True}, _COPY),
    "embed_master": (copy_rows_kernel, _copy_signature("*fp32", "*i64"), {"LOOKUP": True}, _COPY),
    "gather": (gather_rows_kernel, _GATHER_SIGNATURE, {"SUM": False}, _GATHER),
    "gather_sum": (gather_rows_kernel, _GATHER_SIGNATURE, {"SUM": True}, _GATHER),
    "segment_sum": (segment_sum_kernel, _SEGMENT_SIGNATURE, {}, _SEGMENT),
}
"""Function, signature, constants and candidates by the name of the variant."""


def _described(
    name: str,
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    candidates: tuple[Sequence[tuning.Config], tuning.Config],
) -> tuning.Kernel:
    gpu, interpreter = candidates
    return tuning.Kernel(
        name=name,
        function=function,
        signature=signature,
        constants=constants,
        candidates={"sm_90": gpu, "sm_80": gpu, "interpreter": [interpreter]},
        rows="rows",
        divisible=frozenset({"columns", "source_stride", "out_stride"}) & frozenset(signature),
    )
