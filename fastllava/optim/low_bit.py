"""AdamW for one GPU with little memory: moments in 8 bits (`optim.state`), trained weights in bf16 alone (`optim.master`).

Bytes of a trained parameter, and what they come to for the 6.76e9 parameters that stage finetune trains in 7B:

    state   master   weight   gradient   moments     all       7B
    fp32    fp32        4        4         8         16      108 GB
    fp32    bf16        2        4         8         14       95 GB
    8bit    fp32        4        4         2.03      10.03    68 GB
    8bit    bf16        2        4         2.03       8.03    54 GB

With fp32 weights backward also keeps each product's weight in bf16, 2 bytes more, unless `train.recompute` is full.

Weights move by the moments as they were before these were rounded to 8 bits (`fastllava.optim.eight_bit`). Weights in bf16 are rounded
up or down at random, so that they are on average what fp32 would hold: to the nearest, most steps at 2e-5 would change nothing
(Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192). Their gradients are kept and added up in fp32.

The random numbers are a hash of the seed, the step's number, the parameter and the place in it: there is no random state to
keep, and a run that resumes draws what the unbroken one would have drawn.

The loop is not torchao's own, as that cannot hold a step back without asking the device; see `fastllava.optim.FiniteGuard`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastllava.config import OptimConfig
from fastllava.errors import UserError
from fastllava.model.compiled import whole_graph
from fastllava.optim.adamw import Constants, moved, rounded

_PIECE = 2**24
"""Values that are moved at a time, so that what is in fp32 on the way stays small; whole blocks of 8-bit moments."""
_MOMENTS, _PARTS = ("exp_avg", "exp_avg_sq"), ("codes", "scale")


def is_low_bit(optim: OptimConfig) -> bool:
    """Whether the run needs `LowBitAdamW`."""
    return (optim.state, optim.master) != ("fp32", "fp32")


def check_low_bit(optim: OptimConfig, world: int) -> None:
    """Raises UserError when `optim.state` or `optim.master` asks for what cannot run in `world` processes, or is not installed."""
    key, value = ("state", optim.state) if optim.state != "fp32" else ("master", optim.master)
    if is_low_bit(optim) and world > 1:
        raise UserError(f"optim.{key}: '{value}' is for a run of one process; {world} share the fp32 state, so write optim.{key}=fp32")
    if optim.state == "8bit":
        try:
            _eight_bit()
        except ImportError as error:
            mend = "run pip install -e '.[torchao]', or write optim.state=fp32"
            raise UserError(f"optim.state: '8bit' needs torchao, which cannot be loaded ({error}); {mend}") from None


def traffic_bytes(optim: OptimConfig) -> float:
    """What a step reads and writes for each parameter: the gradient for its norm and once more, weight and moments there and back."""
    weight, moments = {"fp32": 4, "bf16": 2}[optim.master], {"fp32": 8, "8bit": 2 + 8 / 256}[optim.state]
    return 2 * (4 + weight + moments)


class LowBitAdamW(torch.optim.Optimizer):
    """AdamW over weights in fp32, or in bf16 with fp32 gradients. Like PyTorch's fused one it stands still where `found_inf` is 1.

    State of a parameter, all plain tensors on its device: `step` fp32 scalar; `exp_avg` and `exp_avg_sq` fp32 in its shape, or in
    place of each where they are quantised `exp_avg_codes` uint8 in that shape and `exp_avg_scale` fp32 [values / 256].
    """

    def __init__(self, groups: Iterable[dict[str, Any]], optim: OptimConfig, seed: int) -> None:
        """`groups` are torch.optim.AdamW's."""
        super().__init__(groups, {"betas": (optim.beta1, optim.beta2), "eps": optim.eps})
        self.found_inf: Tensor | None = None
        """fp32 scalar on the device: 1.0 when nothing may move."""
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        self._device: torch.device = params[0].device
        self._code = _eight_bit() if optim.state == "8bit" else None
        self._tables: list[Tensor] = list(self._code.tables(self._device)) if self._code else []
        self._salts = _salts(sum(len(_pieces(parameter)) for parameter in params), seed).to(self._device)
        for parameter in params:
            parameter.grad_dtype = torch.float32
            self.state[parameter] = {"step": torch.zeros((), device=self._device)} | self._zeros(parameter)

    def _zeros(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Both moments at 0."""
        if self._code is None or not self._code.fits(parameter):
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in _MOMENTS}
        coded = {name: self._code.zeros(parameter) for name in _MOMENTS}
        return {f"{name}_{part}": tensor for name, pair in coded.items() for part, tensor in zip(_PARTS, pair, strict=True)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (nothing to evaluate again)
        """Move every parameter that has a gradient. Nothing here waits for the device."""
        held = torch.zeros((), device=self._device) if self.found_inf is None else self.found_inf
        salts = iter(self._salts)
        for group in self.param_groups:
            constants = *group["betas"], group["eps"], group["weight_decay"]
            # A tensor: as a number each step's rate would be a constant of a new graph.
            lr = torch.full((), group["lr"], device=self._device)
            for parameter in group["params"]:
                pieces = [(piece, next(salts)) for piece in _pieces(parameter)]
                if (gradient := parameter.grad) is not None:
                    step = self.state[parameter]["step"].add_(1 - held)
                    for piece, salt in pieces:
                        weight = parameter.detach().view(-1)[piece]
                        moments = self._moments(parameter, piece)
                        advance_piece(weight, gradient.reshape(-1)[piece], *moments, held > 0, step, lr, salt, *constants)

    def _moments(self, parameter: nn.Parameter, piece: slice) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Views of a piece's mean and square, and the tables that its codes are for."""
        state = self.state[parameter]
        if self._code is None or "exp_avg" in state:
            mean, square = ([state[name].view(-1)[piece]] for name in _MOMENTS)
            return mean, square, []
        blocks = slice(piece.start // self._code.BLOCK, piece.stop // self._code.BLOCK)
        mean, square = ([state[f"{name}_codes"].view(-1)[piece], state[f"{name}_scale"][blocks]] for name in _MOMENTS)
        return mean, square, self._tables


@torch.library.custom_op("fastllava::low_bit_adamw", mutates_args=("weight", "mean", "square"))
def advance_piece(
    weight: Tensor,
    gradient: Tensor,
    mean: Sequence[Tensor],
    square: Sequence[Tensor],
    tables: Sequence[Tensor],
    held: Tensor,
    step: Tensor,
    lr: Tensor,
    salt: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """A step of some values [n] in place; on a GPU as one graph of torch.compile. An op, so that a dry run finds one thing to do.

    mean and square: [values], or where there are tables [codes, scales].
    """
    decode, encode = (_eight_bit().decode, _eight_bit().encode) if tables else (_same, _as_it_is)
    moments = (*mean, *tables[:1]), (*square, *tables[1:])
    constants = Constants(beta1, beta2, eps, weight_decay)
    (_one_graph() if weight.is_cuda else advance)(decode, encode, weight, gradient, *moments, held, step, lr, salt, constants)


@advance_piece.register_fake
def _(weight, gradient, mean, square, tables, held, step, lr, salt, beta1, beta2, eps, weight_decay) -> None:
    return None


@cache
def _one_graph() -> Callable[..., None]:
    return whole_graph(advance, "inductor")


def advance(
    decode: Callable[..., Tensor],
    encode: Callable[..., tuple[Tensor, ...]],
    weight: Tensor,
    gradient: Tensor,
    mean: tuple[Tensor, ...],
    square: tuple[Tensor, ...],
    held: Tensor,
    step: Tensor,
    lr: Tensor,
    salt: Tensor,
    constants: Constants,
) -> None:
    """Write what the step makes of weight and moments over them, where it is not `held`. Moments end with their table, if any."""
    new_weight, *new_moments = moved(weight, gradient, decode(*mean), decode(*square), step, lr, constants)
    if weight.dtype == torch.bfloat16:
        new_weight = rounded(new_weight, salt, step)
    changes = [(weight, new_weight)]
    for kept, values in zip((mean, square), new_moments, strict=True):
        # A table stays as it is.
        changes += zip(kept, encode(values, kept[-1]), strict=False)
    for old, new in changes:
        old.copy_(torch.where(held, old, new))


def _same(values: Tensor) -> Tensor:
    return values


def _as_it_is(values: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return (values,)


def _eight_bit() -> ModuleType:
    """Here, as only some runs need torchao, and it takes a second to load."""
    from fastllava.optim import eight_bit

    return eight_bit


def _pieces(parameter: Tensor) -> list[slice]:
    """The slices of its values in a row."""
    return [slice(start, min(start + _PIECE, parameter.numel())) for start in range(0, parameter.numel(), _PIECE)]


def _salts(count: int, seed: int) -> Tensor:
    """int32 [count], a number of its own for each piece."""
    return torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
