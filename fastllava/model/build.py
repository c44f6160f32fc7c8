"""The one place that builds a LLaVA: for training, for the planner's fake tensors, for a certificate, for benchmarks and for tests."""

import torch
from torch import nn

from fastllava.model.architecture import Architecture
from fastllava.model.compiled import for_batches, for_layers
from fastllava.model.decoders import build_decoder
from fastllava.model.execution import Execution
from fastllava.model.layers import set_parameter
from fastllava.model.linears import Linears
from fastllava.model.llava import Llava
from fastllava.model.ops import Ops
from fastllava.model.products import Product, linear
from fastllava.model.projectors import Projector, kind_of
from fastllava.model.towers import Tower


def build_llava(architecture: Architecture, execution: Execution, projector_source: str = "fresh") -> Llava:
    """Build a LLaVA whose parameters lie on the meta device; `set_parameter`, or `to_empty`, gives them data.

    Nothing about how it computes changes afterwards. `projector_source` is the file or folder that its projector comes from, or
    "fresh". Raises UserError for a `select_layer` that the tower does not have and for a projector that does not fit.
    """
    graph = for_layers(execution.compile, execution.backend)
    with torch.device("meta"):
        llm = build_decoder(architecture.llm, execution.ops, _linears(architecture, execution), graph)
        tower = Tower(architecture.tower, execution.ops, architecture.select_layer, graph)
        projector = build_projector(architecture, execution.ops)
    batches = for_batches(execution.compile, execution.backend)
    return Llava(llm, tower, projector, architecture, execution, projector_source, batches)


def build_projector(architecture: Architecture, ops: Ops) -> Projector:
    """Build the projector alone, on the current default device. Raises UserError when it does not fit tower and decoder."""
    kind, tower = kind_of(architecture.projector_type), architecture.tower
    return kind.build(architecture.projector_type, tower.hidden_size, architecture.llm.hidden_size, tower.patches, ops)


def rebuilt(model: Llava, execution: Execution) -> Llava:
    """Build a model that shares the weights of `model` and computes by `execution`; what trains in one trains in the other."""
    other = build_llava(model.origin, execution, model.projector_source)
    for name, weight in model.named_parameters():
        set_parameter(other, name, nn.Parameter(weight.detach(), weight.requires_grad))
    return other


def _linears(architecture: Architecture, execution: Execution) -> Linears:
    return Linears(execution.ops, _product(execution), architecture.lora, architecture.quantize)


def _product(execution: Execution) -> Product:
    if execution.fp8 == "off":
        return linear
    # Here, as only some runs need torchao.
    from fastllava.model.fp8 import Fp8Linear

    return Fp8Linear(execution.fp8)
