"""The weights of one model over several processes: FSDP2, decoder layer by decoder layer.

What trains is sharded with its fp32 masters, gradients and AdamW's moments. Each decoder layer is a group that is gathered in the
compute dtype when it runs; the rest (projector, embedding, last norm, head), which the fused ops read as it is kept, forms the
root's group and stays gathered, in fp32, from the step's first forward to its last backward. What is frozen is left out of FSDP
and whole on every device, or sharded like the rest (`parallel.frozen`); the tower is always whole, as a process whose
micro-batch has no image does not run it, and would leave the others waiting.

A batch's weights hold the normalisation of the whole step, so gradients are summed over the processes, not averaged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fastllava.config import ParallelConfig
from fastllava.distributed.processes import ALONE, Processes
from fastllava.errors import UserError
from fastllava.model.llava import Llava
from fastllava.model.quantised import weights_by_name

FROZEN_SHARE = 0.4
"""The share of a GPU's memory that a replicated frozen decoder may take."""


@dataclass(frozen=True)
class Sharding:
    """How a step's micro-batches and scalars go over the processes of the run."""

    processes: Processes
    config: ParallelConfig

    def begin_micro_batch(self, model: nn.Module, last: bool) -> None:
        """Before the forward of a micro-batch: whether its backward reduces gradients, and frees gathered weights."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or self.config.reduce == "micro_batch")
            model.set_reshard_after_backward(last or self.config.reshard)

    def end_evaluation(self, model: nn.Module) -> None:
        """After forwards that no backward follows: free the weights that these have gathered."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def total(self, value: Tensor) -> Tensor:
        """`value`, summed over the processes in place, without waiting for a GPU."""
        return self.processes.total(value)


UNSHARDED = Sharding(ALONE, ParallelConfig())
"""The sharding of one process, where there is nothing to do."""


def check_replicas(config: ParallelConfig, world: int) -> None:
    """Raises UserError when `parallel.replicas` does not divide the number of processes."""
    if world % config.replicas:
        raise UserError(f"parallel.replicas: {config.replicas} does not divide the {world} processes; write a divisor of {world}")


def check_gather(config: ParallelConfig, world: int, device: torch.device) -> None:
    """Raises UserError when `parallel.gather` asks for what neither this PyTorch nor this device has."""
    if config.gather == "kernels" or world == 1:
        return
    mend = "write parallel.gather=kernels"
    if not hasattr(FSDPModule, "set_symm_mem_for_comm"):
        raise UserError(
            f"parallel.gather: '{config.gather}' needs FSDP with set_symm_mem_for_comm, which torch {torch.__version__} has not; {mend}"
        )
    if device.type != "cuda":
        raise UserError(f"parallel.gather: '{config.gather}' is for GPUs, and this run is on a {device.type}; {mend}")


def shard(model: Llava, sharding: Sharding, device: torch.device, mesh: DeviceMesh | None = None) -> None:
    """Shard `model` in place over the processes of the run, its weights as they were read; nothing to do for one.

    `requires_grad` must say what trains. Parameters become DTensors on `device`; those left out of FSDP stay as they are.
    `mesh` is `mesh_of` the run, made here when it is left out. Raises UserError when a layer that would be sharded is part of a graph
    with others.
    """
    config = sharding.config
    if sharding.processes.world == 1:
        return
    mesh, whole = mesh or mesh_of(sharding, device), _whole(model, config, device)
    layers = [layer for layer in model.llm.layers if not whole.issuperset(layer.parameters())]
    if layers and model.execution.compile == "step":
        raise UserError("train.compile: 'step' makes one graph, and sharded layers are gathered one by one; write train.compile=layer")
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=config.reshard, mp_policy=policy, ignored_params=whole)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, ignored_params=whole)
    register_fsdp_forward_method(model, "logits")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if config.gather == "copy_engine":
                # After the line above: of sums alone NCCL reduces in symmetric memory too.
                module.set_symm_mem_for_comm()


def _whole(model: Llava, config: ParallelConfig, device: torch.device) -> set[nn.Parameter]:
    """The parameters that every process keeps whole."""
    frozen = {p for p in model.parameters() if not p.requires_grad}
    tower = frozen & set(model.tower.parameters())
    # Quantised weights are not cut.
    alone = config.frozen == "auto" and (model.origin.quantize is not None or _fits(frozen - tower, device))
    replicate = config.frozen == "replicate" or alone
    return frozen if replicate else tower


def sharding_in_words(model: Llava, sharding: Sharding) -> str:
    """How the weights of a sharded `model` lie, and when they and their gradients travel."""
    config, world = sharding.config, sharding.processes.world
    whole = sum(weight.shape.numel() for weight in weights_by_name(model).values() if not isinstance(weight, DTensor))
    copies = f" in each of {config.replicas} replicas" if config.replicas > 1 else ""
    return (
        f"parallel: {world} processes, weights sharded over {world // config.replicas}{copies}, {whole:,} frozen ones whole on each; "
        f"gathered layers {'freed' if config.reshard else 'kept'} between forward and backward"
        f"{', carried by copy engines' if config.gather == 'copy_engine' else ''}; "
        f"gradients summed once a {config.reduce.replace('_', '-')}"
    )


def full_tensors(module: nn.Module, dtype: torch.dtype, keep: bool, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The whole state of `module`, or what of it is `wanted`, on the CPU in `dtype`, by name; nothing where not `keep`.

    Every process must call this.

    A tensor is gathered at a time, so the device holds the largest one only.
    """
    return {name: tensor for name, tensor in _gathered(module, dtype, keep, wanted) if keep}


def _gathered(module: nn.Module, dtype: torch.dtype, keep: bool, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.state_dict().items():
        if not wanted(name):
            continue
        # Rounded before it is gathered: half the bytes to send and to hold.
        whole = tensor.detach().to(dtype)
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        yield name, whole.cpu() if keep else whole


def mesh_of(sharding: Sharding, device: torch.device) -> DeviceMesh | None:
    """The run's processes as FSDP wants them: in a row, or replicas times shards; None for one process."""
    world, replicas = sharding.processes.world, sharding.config.replicas
    if world == 1:
        return None
    if replicas == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def _fits(frozen: set[nn.Parameter], device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return sum(p.nbytes for p in frozen) <= FROZEN_SHARE * torch.cuda.get_device_properties(device).total_memory
