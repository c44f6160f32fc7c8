"""Tensors of files into parameters, and in words what does not fit."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastllava.errors import UserError
from fastllava.model.architecture import Architecture
from fastllava.model.build import build_projector
from fastllava.model.llava import Llava
from fastllava.model.lora import is_adapter
from fastllava.model.ops import reference_ops
from fastllava.model.projectors import KINDS
from fastllava.model.quantised import Nf4Weight, put, weights_by_name
from fastllava.model.weights.files import TensorFiles
from fastllava.model.weights.layouts import to_disk, to_ours

TABLES = ("llm.model.embed_tokens.weight", "llm.transformer.wte.weight", "llm.lm_head.weight")
"""The tensors with a row for each token."""


def fill(
    model: Llava, parts: set[str], files: TensorFiles, found: Mapping[str, str | None], convert: Callable[[str, Tensor], Tensor]
) -> None:
    """Give the parameters of `parts` their tensors; `found` is our name by name on disk.

    `convert` makes of our name and the tensor in the file a tensor of its own, so that nothing goes on living in the file.
    Raises UserError when a tensor is missing, unexpected or of another shape.
    """
    wanted = {name: weight for name, weight in weights_by_name(model).items() if name.split(".")[0] in parts and not is_adapter(name)}
    disk_names = {ours: name for name, ours in found.items() if ours in wanted}
    problems = [f"lacks {name}" + _shape(p) for name, p in wanted.items() if name not in disk_names]
    problems += [f"holds {name}, which this model does not have" for name, ours in found.items() if disk_names.get(str(ours)) != name]
    if not problems:
        for name, tensor in files.stream():
            ours = found.get(name)
            if ours is None:
                continue
            if ours in TABLES and len(tensor) == model.origin.rows:
                tensor = tensor[: model.llm.config.vocab_size]
            if tensor.shape != wanted[ours].shape:
                problems.append(f"has {name}{_shape(tensor)}, where{_shape(wanted[ours])} is needed")
            elif not tensor.is_floating_point():
                problems.append(f"has {name} in {str(tensor.dtype).removeprefix('torch.')}, where floating-point numbers are needed")
            elif not problems:
                try:
                    put(model, ours, convert(ours, tensor))
                except ValueError as error:
                    problems.append(f"has {name}, which {error}")
            # Before the next file is opened, this one is left.
            del tensor
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        remedy = "give weights that fit the config.json"
        if parts == {"projector"}:
            remedy = _projector_remedy(files, wanted, model.origin)
        raise UserError(f"{files.key}: {files.path} {'; '.join(problems[:3])}{more}; {remedy}")


def _projector_remedy(files: TensorFiles, wanted: Mapping[str, Tensor | Nf4Weight], origin: Architecture) -> str:
    """What the file of a projector holds, beside the names that are read, and what to do about it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in files.stream()}
    if not shapes:
        return "it holds no tensor at all; give the file of a training"
    held = ", ".join(f"{name[:80]!r} {list(shape)}" for name, shape in list(shapes.items())[:6])
    held = f"it holds {held}{' and more' if len(shapes) > 6 else ''}"
    needed = {to_disk(name, "llava"): tuple(tensor.shape) for name, tensor in wanted.items()}
    if sorted(shapes.values()) == sorted(needed.values()) and shapes.keys() != needed.keys():
        return f"{held}: its shapes fit and its names do not; rename its tensors to {', '.join(needed)}"
    layers = sum(len(shape) == 2 for shape in shapes.values())
    ours = {to_ours(name, "projector"): shape for name, shape in shapes.items()}
    for other in (name.replace("N", str(layers)) for name in KINDS):
        if ours == _projector_shapes(origin, other):
            return f"{held}, which is a projector of another type; write model.projector_type={other}"
    if layers and layers != sum(len(shape) == 2 for shape in needed.values()) and layers <= 9:
        kind = "linear" if layers == 1 else f"mlp{layers}x_gelu"
        return f"{held}, which is a projector of {layers} layer{'s' if layers > 1 else ''}; write model.projector_type={kind}"
    return f"{held}; give a projector trained with this tower, this LLM and this model.projector_type"


def _projector_shapes(origin: Architecture, projector_type: str) -> dict[str | None, tuple[int, ...]]:
    """By our names, the shapes of this type's weights between the tower and the decoder of `origin`; none where it does not fit them."""
    try:
        with torch.device("meta"):
            projector = build_projector(replace(origin, projector_type=projector_type), reference_ops())
    except UserError:
        return {}
    return {f"projector.{name}": tuple(weight.shape) for name, weight in projector.named_parameters()}


def _shape(tensor: Tensor | Nf4Weight) -> str:
    return f" {list(tensor.shape)}"
