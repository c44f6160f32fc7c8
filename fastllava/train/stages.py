"""The two stages: what each trains, what it starts from and what it leaves behind."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from fastllava.config import Config, Stage
from fastllava.distributed.sharding import full_tensors
from fastllava.errors import UserError
from fastllava.model.execution import COMPUTE_DTYPE
from fastllava.model.llava import Llava
from fastllava.model.lora import adapters, is_adapter
from fastllava.model.weights import (
    projector_config,
    projector_file,
    read_adapter,
    read_origin,
    write_checkpoint,
    write_lora,
    write_projector,
)
from fastllava.train.metrics.summary import damage_of


def check_start(config: Config) -> None:
    """Raises UserError, before any record or weight is read, when a folder or the projector to start from is not there, or nothing trains.

    Stage pretrain draws a projector when none is given; stage finetune wants one.
    """
    if config.stage == "pretrain" and config.model.projector_type == "identity":
        raise UserError("model.projector_type: identity has no weights, so stage pretrain has nothing to train; run stage finetune")
    origin = read_origin(config.model, config.lora)
    trained = None if config.model.adapter is None else _checked_adapter(config, config.model.adapter, origin.llm.num_hidden_layers)
    wanting = origin.layout == "llm" and trained is None
    if isinstance(config.model.projector, Path):
        path = projector_file(config.model.projector)
        if (broken := damage_of(path.parent, (path.name,))) is not None:
            raise UserError(f"model.projector: {path.parent} is the output_dir of a run, but its {broken}; start that run again to mend it")
    if config.stage == "finetune" and config.model.projector is None and config.model.projector_type != "identity" and wanting:
        raise UserError(
            "model.projector: is missing; stage finetune starts from stage pretrain's projector: write "
            "model.projector=OUTPUT_DIR_OF_PRETRAIN/mm_projector.safetensors, or model.projector=fresh to start from a new one"
        )


def _checked_adapter(config: Config, folder: Path, layers: int) -> Path | None:
    """Where the projector lies that comes with the adapters of model.adapter. Raises UserError when they are not what the run wants."""
    if (broken := damage_of(folder, (".safetensors", ".bin"))) is not None:
        raise UserError(f"model.adapter: {folder} is the output_dir of a run, but its {broken}; start that run again to mend it")
    adapter = read_adapter(folder, "model.adapter")
    if config.lora.wanted:
        adapter.to_go_on_from(config.lora, layers)
    else:
        adapter.to_be_added(layers)
    trained = None if adapter.projector_files is None else adapter.projector_files.path
    if trained is not None and isinstance(config.model.projector, Path):
        raise UserError(
            f"model.projector: {config.model.projector}, and the projector that was trained with model.adapter is {trained}; write "
            "model.projector=null to take that one"
        )
    return trained


def trained_parts(model: Llava, stage: Stage) -> list[nn.Module]:
    """The parts that train (llava/train/train.py).

    The projector in stage pretrain; in stage finetune the projector and the decoder, with embedding and head, or its adapters alone.
    """
    if stage == "pretrain":
        return [model.projector]
    return [model.projector, *(adapters(model.llm) if model.origin.lora else [model.llm])]


def prepare_stage(model: Llava, config: Config, place: Callable[[Llava], None] = lambda _: None) -> dict[str, nn.Parameter]:
    """Freeze and unfreeze; the parameters that train, by internal name.

    What trains is kept in fp32, the master weights, made from weights that were rounded to the compute dtype as the
    original's are, or in bf16 (`optim.master`); what is frozen stays in the compute dtype.

    `place` is called with the model when `requires_grad` is right and everything still in the compute dtype: to shard it,
    so that no process ever holds all master weights.
    """
    model.requires_grad_(False)
    parts = trained_parts(model, config.stage)
    for part in parts:
        part.requires_grad_(True)
    place(model)
    for part in parts:
        part.to(COMPUTE_DTYPE[config.optim.master])
    model.train()
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather_result(model: Llava, config: Config, keep: bool) -> dict[str, Tensor]:
    """The state that `write_result` needs of a sharded model, on the CPU of processes that `keep` it; all must call this."""
    dtype = COMPUTE_DTYPE[config.train.precision]
    if config.lora.wanted:
        return full_tensors(model, dtype, keep, lambda name: is_adapter(name) or name.startswith("projector."))
    if config.stage == "finetune":
        return full_tensors(model, dtype, keep)
    return {f"projector.{name}": tensor for name, tensor in full_tensors(model.projector, dtype, keep).items()}


def write_result(
    model: Llava, config: Config, state: Mapping[str, Tensor] | None = None, report: Callable[[str], object] = lambda line: None
) -> list[Path]:
    """Write what the stage leaves in output_dir, in the compute dtype as the original does; the files. Raises OSError.

    pretrain: mm_projector.safetensors, mm_projector.bin and the config.json that the original's loader wants beside them.
    finetune: the first two and a whole checkpoint in the original's layout; where adapters train the original's four files of those alone.
    `state` is `gather_result`'s where the model is sharded. `report` gets a line for whatever was left out or changed.
    """
    dtype = COMPUTE_DTYPE[config.train.precision]
    if config.lora.wanted:
        about = {"image_policy": config.data.image_policy, "max_tokens": config.data.max_tokens, "projector_lr": config.optim.projector_lr}
        files = write_lora(model, config.output_dir, dtype, source=config.model, **about, state=state)
        folder = config.output_dir.name
        if not all(word in folder.lower() for word in ("llava", "lora")):
            report(f"note: the original code tells adapters by 'llava' and 'lora' in the folder's name, and {folder} has not both")
        return [config.output_dir / name for name in files]
    projector = None
    if state is not None:
        projector = {name.removeprefix("projector."): tensor for name, tensor in state.items() if name.startswith("projector.")}
    data, described = config.data, None
    if config.stage == "pretrain":
        described = projector_config(model, dtype, config.model, data.image_policy, data.max_tokens)
    files = write_projector(model.projector, config.output_dir, dtype, projector, described)
    if config.stage == "pretrain":
        return [config.output_dir / name for name in files]
    files += write_checkpoint(
        model,
        "llava",
        config.output_dir,
        dtype,
        source=config.model,
        image_policy=config.data.image_policy,
        max_tokens=config.data.max_tokens,
        legacy=config.data.legacy,
        report=report,
        state=state,
    )
    return [config.output_dir / name for name in files]
