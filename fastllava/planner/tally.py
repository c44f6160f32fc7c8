"""Bytes that live and work that is done while code runs on tensors without data, so of a GPU that is not here.

Everything is counted as PyTorch dispatches it: forward, backward, the optimizer, what FSDP gathers and frees.
"""

import re
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from fastllava_kernels._device import nf4
from fastllava_kernels.masked_linear_cross_entropy.chunked import workspace_bytes

TEMPORARY = "activations"
"""Kind of whatever nothing else was said about: what forward keeps for backward, and what an op leaves for the next."""
WORKSPACE = "loss workspace"
"""Kind of what the fused loss allocates within itself."""
DEQUANTISED = "dequantised weights"
"""Kind of what a product with quantised weights allocates within itself, a block of one at a time; and the part of what it writes."""

_LOSSES = {f"fastllava::masked_linear_cross_entropy_{name}" for name in ("triton", "torch")}
FORWARD, BACKWARD, REST = "forward", "backward", "rest"
"""The passes of a step: what the model computes, what its gradients take, and all else."""

_PRODUCTS = {"aten::mm", "aten::addmm"}
# The optimizer and the gradient's norm. Of DTensors, a dry run of the whole comes here too.
_ONCE_A_STEP = {"aten::_fused_adamw_", "fastllava::low_bit_adamw", "aten::linalg_vector_norm", "aten::_foreach_norm"}


SUMS = "sums in products"
"""The part of what products add their results to, and of results in fp32: a product at its ceiling writes in its inputs' dtype."""

ADAPTERS = "adapters"
"""The part of what an op with a low-rank product moves beside the large product in it: that one's result again, say. Too narrow for the
ceiling of products, it takes as long as this; its operations are counted with theirs all the same, which is up to 5 % too much."""
_FROZEN = r"fastllava::(nf4|lora)_linear_"
"""Ops of products with frozen weights, apart from those that PyTorch has."""

PARTS: Mapping[str, str] = {
    "casts": r"aten::_to_copy",
    "gradient adds": r"aten::(_foreach_)?add_",
    "adds": r"aten::add",
    "norms": r"fastllava::\w*norm_\w+",
    "rope": r"fastllava::rope_\w+",
    "swiglu": r"fastllava::swiglu_\w+",
    "loss": r"fastllava::masked_linear_cross_entropy_\w+",
}
"""Names for what moves bytes, with the names of the ops; whatever is not among them is "other". Products have SUMS."""


def part_of(name: str) -> str:
    """The part of PARTS that an op, such as aten::add_, belongs to."""
    return next((part for part, pattern in PARTS.items() if re.fullmatch(pattern, name)), "other")


@dataclass
class _Storage:
    reference: weakref.ref
    size: int
    kind: str


@dataclass
class Tally(TorchDispatchMode):
    """Counts while it is entered. Sizes are in bytes."""

    sharded: bool = False
    """Whether FSDP is at work: it frees what it gathered by resizing it, which is no op and has to be looked for."""
    live: Counter[str] = field(default_factory=Counter)
    """By kind, now."""
    peak: Counter[str] = field(default_factory=Counter)
    """By kind, when all together were most."""
    traffic: Counter[str] = field(default_factory=Counter)
    """By part, read and written by ops that are no matrix product, attention, collective or optimizer; of products see SUMS."""
    ops: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many were dispatched that move anything, by part of the step and name; products, attention and the optimizer are among them."""
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What these read and write."""
    dispatched: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many were dispatched at all, views too, by part of the step and namespace, such as "aten": each takes time of the host."""
    communicated: int = 0
    """Handed to collectives: of a gather or a reduction the whole, unsharded tensor."""

    def __post_init__(self) -> None:
        super().__init__()
        self._known: dict[int, _Storage] = {}
        self._resizable: dict[int, _Storage] = {}
        """Those that FSDP may free and fill again."""
        self._kind, self._part = TEMPORARY, REST

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """What is allocated within counts as `name`."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def watch(self, model: nn.Module) -> None:
        """What `model` does when it is called is the forward part."""
        model.register_forward_pre_hook(lambda *_: setattr(self, "_part", FORWARD))
        model.register_forward_hook(lambda *_: setattr(self, "_part", REST))

    def name(self, tensor: Tensor, kind: str) -> None:
        """From here on the bytes of `tensor` count as `kind`."""
        storage = self._track(tensor)
        if storage.kind != kind:
            self.live[storage.kind] -= storage.size
            self.live[kind] += storage.size
            storage.kind = kind

    def begin(self) -> None:
        """Work is counted, and the peak looked for, from here on."""
        self.peak = Counter(self.live)
        self.traffic, self.communicated = Counter(), 0
        for counted in (self.ops, self.moved, self.dispatched):
            counted.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # A DTensor says the size of the whole; it comes back here with its part.
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [value for value in tree_iter(result) if isinstance(value, Tensor)]
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in self._known]
        for tensor in outputs:
            storage = self._track(tensor)
            if self.sharded and func is torch.ops.aten.empty.memory_format:
                self._resizable[tensor.untyped_storage()._cdata] = storage
        if self.sharded:
            self._resize()
        self._look(*_within(func, args))
        self._count(func, args, kwargs, inputs, new, result)
        return result

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], new: list[Tensor], result: Any
    ) -> None:
        # Autograd's engine is at work; a layer that is computed again is so within it.
        part = BACKWARD if torch._C._current_graph_task_id() != -1 else self._part
        # Tensors without data are asked for their device by ops of that name, of which others have none.
        self.dispatched[part, func.namespace] += func.namespace != "prim"
        if func.namespace == "c10d":
            self.communicated += max((tensor.nbytes for tensor in (*inputs, *new)), default=0)
        elif not _moves_nothing(func):
            name = func.name().partition(".")[0]
            read = () if name.endswith("_like") else _read(func, args, kwargs)
            moved = sum(tensor.nbytes for tensor in (*read, *new, *_written(func, args, kwargs)))
            if moved:
                self.ops[part, _told(name, inputs, new)] += 1
                self.moved[part, _told(name, inputs, new)] += moved
            if not (func.overloadpacket in flop_registry or "attention" in func.name() or name in _ONCE_A_STEP):
                if re.match(_FROZEN, name):
                    # A product at its ceiling reads its operands, and writes its result once; quantised ones are written by a kernel.
                    self.traffic[ADAPTERS] += _of_adapters(name, args, result)
                    if _multiplies_quantised(name):
                        self.traffic[DEQUANTISED] += sum(2 * codes.numel() * args[0].dtype.itemsize for codes in _codes(args))
                else:
                    self.traffic[part_of(name)] += moved
            elif name in _PRODUCTS:
                self.traffic[SUMS] += _beside_a_product(name, args, result)

    def _track(self, tensor: Tensor) -> _Storage:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = _Storage(weakref.ref(storage, lambda _: self._drop(key)), size, self._kind)
            self.live[self._kind] += size
        return self._known[key]

    def _drop(self, key: int) -> None:
        storage = self._known.pop(key)
        self._resizable.pop(key, None)
        self.live[storage.kind] -= storage.size

    def _resize(self) -> None:
        for known in list(self._resizable.values()):
            storage = known.reference()
            if storage is not None and storage.nbytes() != known.size:
                self.live[known.kind] += storage.nbytes() - known.size
                known.size = storage.nbytes()

    def _look(self, within: int, kind: str) -> None:
        if self.live.total() + within > self.peak.total():
            self.peak = Counter(self.live)
            if within:
                self.peak[kind] += within


def _beside_a_product(name: str, args: tuple[Any, ...], result: Tensor) -> int:
    """What it moves beside its operands and a result in their dtype: what it adds to, and a result that is wider."""
    added, operand = (args[0].nbytes, args[1]) if name == "aten::addmm" else (0, args[0])
    return added + (result.nbytes if result.dtype != operand.dtype else 0)


def _told(name: str, inputs: list[Tensor], new: list[Tensor]) -> str:
    """An op's name, and the dtype where it tells one use of the op from another: casts and additions."""
    if name in ("aten::_to_copy", "aten::copy_") and inputs:
        made = new[0] if new else inputs[0]
        return f"{name} {_dtype(inputs[-1])} to {_dtype(made)}"
    return f"{name} {_dtype(inputs[0])}" if name in ("aten::add", "aten::add_") and inputs else name


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _moves_nothing(func: Any) -> bool:
    """Whether an op only makes a view, sets memory aside or asks something about a tensor."""
    returns = func._schema.returns
    is_view = bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    return is_view or func.namespace == "prim" or "::empty" in func.name() or "::new_empty" in func.name()


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The inputs that the op reads: all but those that it is given with `out=`."""
    out = {argument.name for argument in func._schema.arguments if argument.is_out}
    yield from (value for value in tree_iter((args, {key: kwargs[key] for key in kwargs if key not in out})) if isinstance(value, Tensor))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The inputs that the op writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (value for value in tree_iter(given) if isinstance(value, Tensor))


def _within(func: Any, args: tuple[Any, ...]) -> tuple[int, str]:
    """What a fused op of ours allocates while it runs, beside what it returns, and the kind of it."""
    name = func.name().partition(".")[0]
    if name in _LOSSES:
        hidden, weight, rows, _, _, wants_hidden, wants_weight = args
        return workspace_bytes(rows.shape[0], hidden.dtype, weight, wants_hidden or wants_weight, wants_weight), WORKSPACE
    if _multiplies_quantised(name):
        return max((nf4.workspace_bytes(codes, args[0].dtype) for codes in _codes(args)), default=0), DEQUANTISED
    return 0, WORKSPACE


def _multiplies_quantised(name: str) -> bool:
    """Whether an op has products with weights that may be quantised."""
    return re.match(_FROZEN, name) is not None and not name.endswith("_hidden")


def _of_adapters(name: str, args: tuple[Any, ...], result: Any) -> int:
    """The part ADAPTERS of an op of lora_linear; 0 of others."""
    if not name.startswith("fastllava::lora_linear_"):
        return 0
    x = args[0].nbytes
    if name.endswith("_hidden"):
        return x + result[0].nbytes
    if not name.endswith("_backward"):
        return 2 * sum(out.nbytes for out in result)
    outs = [out.nbytes for out in args[1] if out is not None]
    # Gradients of results are read for B and for what goes into it, x for A, and the gradient of x is added to, by other layers too.
    return 2 * sum(outs) + x + 2 * x * len(outs)


def _codes(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The codes of quantised weights, which are matrices of bytes; those of their scales are in a row."""
    yield from (value for value in tree_iter(args) if isinstance(value, Tensor) and value.dtype is torch.uint8 and value.ndim == 2)
