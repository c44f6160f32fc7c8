"""torch.compile as a toggle: `off`, each `layer`, or the whole forward of a micro-batch (`step`), always as whole graphs.

A graph holds for every number of rows, samples and images; only sizes 0 and 1 get graphs of their own, as torch.compile
computes with those as constants. How many there can be in one run:

- layer: one for all blocks of the tower, one for the first decoder layer, which takes one tensor where the others take two, one for
  all others but the last, and for the last one each of 0, 1 and more supervised rows, so at most six;
- step: one for each of 0, 1 and more images with each of 0, 1 and more supervised rows, so at most nine.

An evaluation, which has no gradients, makes as many again, and leaves those of the training as they are.

Loss and gradients are the eager ones up to the order of additions.
"""

from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as shapes_config
from torch import Tensor, nn

from fastllava.batch import Batch
from fastllava.config import Compile
from fastllava.errors import UserError

GRAPHS: dict[Compile, int] = {"off": 0, "layer": 6, "step": 9}
"""The most graphs that a run compiles; with evaluation twice as many."""

Graph = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What becomes of a function of a model: itself, or its graphs."""

# Above what any run needs; beyond it a whole graph is an error, never a fall back to eager.
_RECOMPILE_LIMIT = 32


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` as it is: no graph."""
    return function


def for_layers(mode: Compile, backend: str | Callable[..., Any] = "inductor") -> Graph:
    """What becomes of the functions that compute a decoder layer and a block of the tower."""
    return (lambda function: whole_graph(function, backend)) if mode == "layer" else eager


def for_batches(mode: Compile, backend: str | Callable[..., Any] = "inductor") -> Graph:
    """What becomes of the function that computes the loss of a batch."""
    return (lambda function: _graph_of_batches(function, backend)) if mode == "step" else eager


def _graph_of_batches(function: FunctionType, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    graph = whole_graph(function, backend)

    def call(model: nn.Module, batch: Batch) -> Tensor:
        # The size of an image never changes: with symbols in its place the shapes of patches take minutes to work out.
        torch._dynamo.mark_static(batch.pixels, [1, 2, 3])
        return graph(model, batch)

    return call


def whole_graph(function: FunctionType, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile with dynamic sizes; whatever does not fit into one graph is an error."""
    # torch.compile keeps its graphs by code object: a copy, so that the models of one process do not share and count them together.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=backend)

    def call(*args: Any) -> Any:
        with ExitStack() as settings:
            # Two sizes that happen to be equal, such as images and samples, are not taken for one; eps is a constant.
            settings.enter_context(shapes_config.patch(use_duck_shape=False))  # pyright: ignore[reportAttributeAccessIssue]
            settings.enter_context(dynamo_config.patch(recompile_limit=_RECOMPILE_LIMIT, specialize_float=True))
            return compiled(*args)

    return call


def check_compiler(mode: Compile, device: torch.device) -> None:
    """Raises UserError when torch.compile cannot make code for `device` here, for want of a C++ compiler, say."""
    if mode == "off":
        return
    probe = torch.compile(lambda x: x.exp() + 1, fullgraph=True)
    try:
        probe(torch.zeros(2, device=device))
    except (RuntimeError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"train.compile: '{mode}' cannot run here ({reason}); install a C++ compiler such as g++, or write train.compile=off"
        ) from None
