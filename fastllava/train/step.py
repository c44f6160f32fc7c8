"""The step: micro-batches in, an optimizer step done, and figures that are still on the device."""

from collections.abc import Sequence

import torch

from fastllava.batch import Batch
from fastllava.distributed.sharding import UNSHARDED, Sharding
from fastllava.model.llava import Llava
from fastllava.model.products import accumulation
from fastllava.optim import FiniteGuard, clip_gradients, gradient_norm, parameters
from fastllava.train.metrics.log import DeviceScalars


def train_step(
    model: Llava,
    optimizer: torch.optim.Optimizer,
    guard: FiniteGuard,
    batches: Sequence[Batch],
    device: torch.device,
    max_norm: float | None,
    sharding: Sharding = UNSHARDED,
) -> DeviceScalars:
    """One optimizer step over its micro-batches: fp32 loss, gradient norm before clipping, whether the guard has tripped, and `guard.far`.

    `batches` are this process's; loss and norm are those of all. The batches' weights already hold the step's normalisation,
    so losses and gradients only add up. Nothing here waits for the device.
    """
    loss = torch.zeros((), device=device)
    with accumulation(hold=model.execution.recompute == "none"):
        for number, batch in enumerate(batches, 1):
            sharding.begin_micro_batch(model, last=number == len(batches))
            part = model(batch.to(device))
            part.backward()
            loss += part.detach()
    loss = sharding.total(loss)
    params = parameters(optimizer)
    norm = gradient_norm(params)
    tripped = guard.watch(loss, norm)
    if max_norm is not None:
        clip_gradients(params, norm, max_norm)
    guard.moving = True
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return DeviceScalars(loss, norm, tripped, *guard.far)
