"""AdamW as the original runs it: parameter groups, learning rate by step, gradient norm, and the guard against bad steps."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastllava.config import OptimConfig
from fastllava.optim.low_bit import LowBitAdamW, is_low_bit
from fastllava.optim.spikes import SIGMAS, recent

Named = Iterable[tuple[str, nn.Parameter]]


def build_optimizer(named: Named, optim: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW over the parameters that train, fused so that `FiniteGuard` can hold it back on the device.

    Where `optim.state` or `optim.master` asks for it `LowBitAdamW`, which `FiniteGuard` can hold back too, and which draws by `seed`.

    Groups as in the original's `create_optimizer` (llava/train/llava_trainer.py), in its order, some of them perhaps empty: what decays,
    then norms and biases, which do not, and the same of the projector when it has a learning rate of its own. Each group keeps that
    rate as `base_lr`.
    """
    rates = {False: optim.lr} if optim.projector_lr is None else {False: optim.lr, True: optim.projector_lr}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(own, decays): [] for own in rates for decays in (True, False)}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = "norm" not in name and "bias" not in name
            groups[len(rates) > 1 and name.startswith("projector."), decays].append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": params, "lr": rates[own], "base_lr": rates[own], "weight_decay": optim.weight_decay if decays else 0.0}
        for (own, decays), params in groups.items()
    ]
    if is_low_bit(optim):
        return LowBitAdamW(settings, optim, seed)
    optimizer = torch.optim.AdamW(settings, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    for parameter in parameters(optimizer):
        # What AdamW would make at its first step: here from the start, so that a checkpoint before that step is whole too.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def lr_factor(step: int, n_steps: int, optim: OptimConfig) -> float:
    """What every learning rate is multiplied by at `step` (0-based) of `n_steps`; 0 at step 0 when there is a warm-up.

    The schedules of transformers 4.37 (optimization.py), which the original uses: a linear warm-up of
    ceil(warmup_ratio * n_steps) steps, then the cosine's half period or a line down to 0, or a constant rate.
    """
    warmup = math.ceil(n_steps * optim.warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, n_steps - warmup)
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, (n_steps - step) / max(1, n_steps - warmup))
        case "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that train, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradient_norm(params: list[nn.Parameter]) -> Tensor:
    """fp32 scalar on the device: the 2-norm of all gradients together, over all shards. The host does not wait for a GPU."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(params: list[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by `max_norm / norm` where the norm is above `max_norm`, without waiting for the device."""
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)


class FiniteGuard:
    """Keeps the optimizer still from the first step whose loss or gradient norm is not finite, and in spikes when asked to.

    The verdict stays on the device: the optimizer's step skips weights, moments and its own counter where `found_inf` is 1.
    The flag never goes back to 0, so the state stays that before the bad step until the host reads `tripped` and stops.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, skip_spikes: bool = False) -> None:
        self.tripped = torch.zeros((), device=device)
        """fp32 scalar on the device: 1.0 from the first bad step on."""
        self.moving = False
        """On the host, whether the optimizer has begun a step that nobody has counted: what is in memory is then no step's state."""
        self.far = torch.zeros(2, device=device)
        """fp32 [2] on the device: how far loss and norm of this step lie above those before it (`fastllava.optim.spikes`)."""
        self._optimizer, self._skip_spikes = optimizer, skip_spikes
        self._recent = recent(optimizer)
        self._with_this = self._recent.values
        # Together with the weights: a step that fails on the way has left both as they were.
        optimizer.register_step_post_hook(lambda *_: self._remember())

    def watch(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Note whether this step is finite, before `optimizer.step()`; the flag as of this step."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.tripped = torch.maximum(self.tripped, bad.float())
        self.far, grown = self._recent.judge(torch.stack([loss, norm]).float())
        self._with_this = torch.where(self.tripped > 0, self._recent.values, grown)
        held = torch.maximum(self.tripped, (self.far > SIGMAS).any().float()) if self._skip_spikes else self.tripped
        self._optimizer.found_inf = held  # pyright: ignore[reportAttributeAccessIssue] (read by its step)
        return self.tripped

    def _remember(self) -> None:
        self._recent.values = self._with_this
