"""An op of PyTorch's dispatcher that costs the host little: what its schema says is looked at once, not at every call.

`torch.library.custom_op` makes the same op for several times the host's time (kernels/README.md, lab book): each call reads the schema
anew, looks for memory that inputs and results share, and leaves torch.compile. Here `torch.library.opcheck`, in the tests of every
room, is what holds that an op writes over no input and returns none.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

NAMESPACE = "fastllava"

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
"""One for all ops: they are there for as long as the process is."""


class Op:
    """The op fastllava::`name` over `function`, whose annotations are its schema, on every device.

    Backward through it raises RuntimeError before `register_autograd`, and through its gradients always.
    Raises ValueError for a function with lists of tensors among several results, or that PyTorch has no schema for.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = f"{NAMESPACE}::{name}", function
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        given, returns = self.overload._schema.arguments, self.overload._schema.returns
        self._lists = tuple(at for at, argument in enumerate(given) if _is_list(argument.type))
        self._returns_list = any(_is_list(result.type) for result in returns)
        if self._returns_list and len(returns) > 1:
            raise ValueError(f"{self.name}: a list of tensors is its only result, or it returns none")
        # PyTorch leaves out what equals its default.
        self._defaults = tuple(argument.default_value for argument in given)
        self.register_autograd(self._refuse, setup_context=_keep_nothing)
        _LIBRARY.impl(name, self._with_gradients, "Autograd")

    def __call__(self, *args: Any) -> Any:
        """Compute it. Outside of torch.compile it skips what the dispatcher would only come back here for."""
        return self.overload(*args) if torch.compiler.is_compiling() else self._with_gradients(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what it returns for tensors without data."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, gradients: Callable[..., Any], *, setup_context: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        """Say how to differentiate it, as torch.library.register_autograd: a list of tensors has a list of gradients."""
        self._gradients, self._keep = gradients, setup_context
        self._function = self._of_lists() if self._lists or self._returns_list else self._of_tensors()

    def _with_gradients(self, *args: Any) -> Any:
        """What the dispatcher calls when it is autograd's turn."""
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._function(*args, *self._defaults[len(args) :])
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _of_tensors(self) -> Callable[..., Any]:
        overload, keep, gradients = self.overload, self._keep, self._gradients

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    result = overload(*args)
                    keep(ctx, args, result)
                return result

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return gradients(ctx, *grads)

        return _named(Function, self.name).apply

    def _of_lists(self) -> Callable[..., Any]:
        """Autograd knows tensors only: lists are laid out one after another, and made again."""
        overload, keep, gradients, lists, returns_list = self.overload, self._keep, self._gradients, self._lists, self._returns_list

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, lengths: Sequence[int], *flat: Any) -> Any:
                args = _listed(flat, lists, lengths)
                with torch._C._AutoDispatchBelowAutograd():
                    result = overload(*args)
                    keep(ctx, args, result)
                ctx._lengths = lengths
                return tuple(result) if returns_list else result

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                needs = ctx.needs_input_grad
                ctx.needs_input_grad = _listed(needs[1:], lists, ctx._lengths)
                try:
                    found = gradients(ctx, list(grads)) if returns_list else gradients(ctx, *grads)
                finally:
                    ctx.needs_input_grad = needs
                return None, *_flat(found if isinstance(found, tuple) else (found,), lists)

        function = _named(Function, self.name).apply

        def apply(*args: Any) -> Any:
            result = function(tuple(len(args[at]) for at in lists), *_flat(args, lists))
            return list(result) if returns_list else result

        return apply

    def _refuse(self, ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{self.name} gets no gradient, nor does what its gradient is made of")


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _named(function: type[torch.autograd.Function], name: str) -> type[torch.autograd.Function]:
    """Name a class as graphs and profiles shall show it."""
    function.__name__ = function.__qualname__ = name.replace("::", "_")
    return function


def _is_list(kind: Any) -> bool:
    """Whether a type of a schema is that of a list of tensors, some of which may be None."""
    return str(kind) in ("List[Tensor]", "List[Optional[Tensor]]")


def _flat(args: tuple[Any, ...], lists: Sequence[int]) -> tuple[Any, ...]:
    """All of `args`, with what lies in those at `lists` in their place."""
    return tuple(x for at, arg in enumerate(args) for x in (arg if at in lists else (arg,)))


def _listed(flat: Sequence[Any], lists: Sequence[int], lengths: Sequence[int]) -> tuple[Any, ...]:
    """What `_flat` was given, from what it gave."""
    rest, at_list = iter(flat), dict(zip(lists, lengths, strict=True))
    count = len(flat) - sum(lengths) + len(lists)
    return tuple(list(islice(rest, at_list[at])) if at in at_list else next(rest) for at in range(count))
