"""The machine of a run: the device it takes, and whether what the config asks for can run there."""

import torch

from fastllava.config import Config
from fastllava.distributed.processes import Processes
from fastllava.distributed.sharding import check_gather, check_replicas
from fastllava.errors import UserError
from fastllava.model.compiled import check_compiler
from fastllava.model.decoders import DecoderConfig
from fastllava.model.execution import COMPUTE_DTYPE
from fastllava.model.ops import Ops, choose_ops
from fastllava.model.weights import read_origin
from fastllava.optim.low_bit import check_low_bit
from fastllava.train.deterministic import check_repeats, is_asked_for, set_deterministic
from fastllava.train.metrics.backends import check_backends
from fastllava.train.stages import check_start


def check_run(config: Config, group: Processes) -> tuple[torch.device, Ops]:
    """The device and the kernels, once all is there that can be looked for before data and weights are read."""
    device, mode = choose_device(config, group.local_rank), config.train.compile
    dtype, origin = COMPUTE_DTYPE[config.train.precision], read_origin(config.model, config.lora)
    ops = choose_ops(config.kernels, device, dtype, compiled=mode != "off", sizes=origin.sizes, repeats=is_asked_for(config))
    set_tf32(config)
    set_deterministic(config)
    check_repeats(config, device, ops, origin.llm.attention_width)
    check_compiler(mode, device)
    check_backends(config.log)
    check_replicas(config.parallel, group.world)
    check_gather(config.parallel, group.world, device)
    check_low_bit(config.optim, group.world)
    check_fp8(config, device, group.world)
    check_fp8_widths(config, origin.llm)
    check_start(config)
    return device, ops


def choose_device(config: Config, local_rank: int = 0) -> torch.device:
    """`train.device`, or the GPU when there is one: that of number `local_rank`. Raises UserError when it is not there."""
    wanted, gpus = config.train.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not gpus:
        raise UserError("train.device: 'cuda' is not available here; write train.device=cpu or auto, or install a CUDA build of torch")
    if wanted == "cpu" or not gpus:
        return torch.device("cpu")
    if local_rank >= gpus:
        raise UserError(f"torchrun: --nproc-per-node asks for more processes than the {gpus} GPUs here; write {gpus}, or train.device=cpu")
    return torch.device("cuda", local_rank)


def set_tf32(config: Config) -> None:
    """Let fp32 matrix products take TF32, or not: in either case by the config, whatever PyTorch or another run left behind."""
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")


def check_fp8_alone(config: Config, world: int) -> None:
    """Raises UserError when `train.fp8` is asked for in several processes."""
    if config.train.fp8 != "off" and world > 1:
        raise UserError(f"train.fp8: '{config.train.fp8}' is for a run of one process, not of {world}; write train.fp8=off")


def check_fp8(config: Config, device: torch.device, world: int) -> None:
    """Raises UserError when `train.fp8` asks for what cannot run on `device`, in `world` processes, or is not installed."""
    recipe = config.train.fp8
    if recipe == "off":
        return
    check_fp8_alone(config, world)
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        version = ".".join(map(str, found))
        raise UserError(f"train.fp8: '{recipe}' needs a GPU of compute capability 8.9 or newer, not {version}; write train.fp8=off")
    try:
        import fastllava.model.fp8  # noqa: F401
    except ImportError as error:
        mend = "run pip install -e '.[torchao]', or write train.fp8=off"
        raise UserError(f"train.fp8: '{recipe}' needs torchao, which cannot be loaded ({error}); {mend}") from None


def check_fp8_widths(config: Config, llm: DecoderConfig) -> None:
    """Raises UserError when `train.fp8` asks for products whose widths are no multiples of 16, before any weight is read."""
    recipe = config.train.fp8
    if recipe == "off":
        return
    widths = {
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.intermediate_size,
        "num_attention_heads x head_dim": llm.num_attention_heads * llm.head_dim,
        "num_key_value_heads x head_dim": llm.num_key_value_heads * llm.head_dim,
    }
    for name, width in widths.items():
        if width % 16:
            raise UserError(f"train.fp8: '{recipe}' needs multiples of 16, and {name} of model.llm is {width}; write train.fp8=off")
