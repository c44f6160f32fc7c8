"""What the variants of `fastllava bench peers` that are made of transformers' modules share: batches, optimizer, the step.

Shape letters: B samples of a micro-batch, L tokens of its longest.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benches.lib.ours import Fastllava, Run, tensor_bytes
from fastllava.data.loader import Sample
from fastllava.data.plan import Step
from fastllava.train.deterministic import set_deterministic
from fastllava.train.machine import set_tf32
from fastllava.train.metrics.flops import Accounting, Flops, Work
from fastllava.train.metrics.log import DeviceScalars

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Shared:
    """What all variants keep together: at a rate of 0 the weights stay what they are, so one copy serves all, and so do AdamW's moments.

    It leaves memory for more layers. What a variant needs is still counted as if it were alone.
    """

    weights: Mapping[str, Tensor]
    """By our names, in the compute dtype."""
    trained: Mapping[int, tuple[nn.Parameter, Mapping[str, Tensor]]]
    """By the place in memory of one of `weights`: our parameter, the master, and AdamW's state of it."""

    @classmethod
    def of(cls, ours: Fastllava) -> "Shared":
        """What our trainer has to share."""
        weights = {name: parameter.detach().to(ours.run.dtype) for name, parameter in ours.model.named_parameters()}
        state = ours.optimizer.state
        return cls(weights, {weights[name].data_ptr(): (parameter, state[parameter]) for name, parameter in ours.trained.items()})


class Peer(ABC):
    """A way to train on padded micro-batches of a fixed number of samples, at the rate 0 of the recipe's step 0: no weight moves."""

    def __init__(self, run: Run, device: torch.device, shared: Shared, micro_batch: int) -> None:
        self.run, self.device, self.micro_batch, self.shared = run, device, micro_batch, shared
        self.attention = attention_for(device)

    def start(self, modules: Sequence[nn.Module], trained: Iterable[nn.Parameter], others: Iterable[nn.Parameter] = ()) -> None:
        """Freeze everything of `modules` but `trained` and make the optimizer; the last act of a constructor. `others` are in no module."""
        self.parameters = list(trained)
        for module in modules:
            module.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = MasterAdamW(self.parameters, self.shared.trained)
        self._kept = [*others, *(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))]

    @abstractmethod
    def collate(self, samples: Sequence[Sample]) -> Tensors:
        """What its collator hands over for one micro-batch, on the host."""

    @abstractmethod
    def loss(self, batch: Tensors, supervised: int) -> Tensor:
        """The micro-batch's part in the mean over the step's `supervised` tokens."""

    @property
    @abstractmethod
    def accounting(self) -> Accounting:
        """Counts what it does."""

    def batches(self, step: Step) -> list[Tensors]:
        """The step's micro-batches in the recipe's order."""
        samples = self.run.contents(step)
        collated = [self.collate(samples[start : start + self.micro_batch]) for start in range(0, len(samples), self.micro_batch)]
        return [_map(Tensor.pin_memory, batch) for batch in collated] if self.device.type == "cuda" else collated

    def step(self, batches: Sequence[Tensors], judged: bool = False) -> DeviceScalars:
        """One optimizer step: the loss and, when `judged`, the norm of its gradient, else 0. One that fails leaves no gradient."""
        try:
            return self._step(batches, judged)
        except BaseException:
            self.drop_gradients()
            raise

    def _step(self, batches: Sequence[Tensors], judged: bool) -> DeviceScalars:
        set_tf32(self.run.config)
        set_deterministic(self.run.config)
        loss = norm = torch.zeros((), device=self.device)
        supervised = sum(batch["supervised"] for batch in batches)
        for batch in batches:
            part = self.loss(_map(lambda tensor: tensor.to(self.device, non_blocking=True), batch), supervised)
            part.backward()
            loss = loss + part.detach().float()
        if judged:
            norm = torch.nn.utils.get_total_norm([p.grad.float() for p in self.parameters if p.grad is not None])
        # A variant is judged before it takes turns: a gradient that is not finite reaches nothing that the others have too.
        self.optimizer.step(skip=~torch.isfinite(norm) if judged else None)
        return DeviceScalars(loss, norm)

    def hardware_flops(self, step: Step) -> Flops:
        """What it computes: every padded token, masked pairs included, and the logits of each."""
        rows = self.rows(step)
        pairs = sum(count * longest**2 for count, longest in self._shapes(step))
        return self.accounting.hardware_flops(Work(rows=rows, pairs=pairs, images=self.images(step), supervised=rows))

    def rows(self, step: Step) -> int:
        """The tokens that its decoder computes, padding included."""
        return sum(count * longest for count, longest in self._shapes(step))

    def _shapes(self, step: Step) -> list[tuple[int, int]]:
        """(B, L) of each micro-batch."""
        lengths = self.run.samples.n_tokens[step.samples]
        cuts = [lengths[start : start + self.micro_batch] for start in range(0, len(lengths), self.micro_batch)]
        return [(len(cut), int(cut.max())) for cut in cuts]

    def drop_gradients(self) -> None:
        """Forget what a step that failed has left."""
        for parameter in (*self.parameters, *self.optimizer.masters):
            parameter.grad = None

    def images(self, step: Step) -> int:
        """The images that its tower sees."""
        return int(self.run.samples.n_images[step.samples].sum())

    def state_bytes(self) -> int:
        """The bytes of weights, buffers and optimizer."""
        return tensor_bytes([*self._kept, *self.optimizer.tensors()])


def _map(function: Any, batch: Tensors) -> Tensors:
    """The same batch with `function` of each tensor."""
    return {name: function(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


class MasterAdamW:
    """Fused AdamW; of weights that are not fp32 it keeps fp32 masters and writes them back, as DeepSpeed's bf16 does."""

    def __init__(self, weights: Sequence[nn.Parameter], known: Mapping[int, tuple[nn.Parameter, Mapping[str, Tensor]]]) -> None:
        """`known`: as `Shared.trained`; weights that are not in it get masters and moments of their own."""
        self.weights = weights
        self.masters = [_master(weight, known) for weight in weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=0.0, weight_decay=0.0, fused=True)
        for weight, master in zip(weights, self.masters, strict=True):
            _, shared = known.get(weight.data_ptr(), (None, {}))
            state = self.adamw.state[master]
            state["step"] = torch.zeros((), device=master.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = shared[name] if name in shared else torch.zeros_like(master)

    def step(self, skip: Tensor | None = None) -> None:
        """Move the weights and drop their gradients. `skip`, a scalar: where it is true nothing moves."""
        self.adamw.found_inf = None if skip is None else skip.float()  # pyright: ignore[reportAttributeAccessIssue] (read by fused AdamW)
        pairs = [(weight, master) for weight, master in zip(self.weights, self.masters, strict=True) if weight is not master]
        for weight, master in pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for weight, master in pairs:
                weight.copy_(master)

    def tensors(self) -> Iterable[Tensor]:
        """Masters and moments."""
        yield from self.masters
        for state in self.adamw.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _master(weight: nn.Parameter, known: Mapping[int, tuple[nn.Parameter, Mapping[str, Tensor]]]) -> nn.Parameter:
    """The fp32 parameter that AdamW moves."""
    if weight.dtype == torch.float32:
        return weight
    return known[weight.data_ptr()][0] if weight.data_ptr() in known else nn.Parameter(weight.detach().float())


def recompute_layers(module: Any, reentrant: bool) -> None:
    """Let a model of transformers keep each decoder layer's input only; its method has another name from 5.24 on."""
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def attention_for(device: torch.device) -> str:
    """What transformers attends with: FlashAttention 2 where it is installed, as the original's train_mem.py; else PyTorch's."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"
