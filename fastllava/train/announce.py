"""What a run says before its first step: what trains, on what data, in which steps, and how it computes."""

from collections.abc import Iterator

import torch
from torch import nn

from fastllava.config import Config, LoraConfig
from fastllava.console.allocator import allocator_in_words
from fastllava.console.speaker import Say
from fastllava.data.plan import Plan
from fastllava.distributed.sharding import Sharding, sharding_in_words
from fastllava.model.llava import Llava
from fastllava.model.lora import is_adapter
from fastllava.model.projectors import kind_of
from fastllava.model.quantised import count
from fastllava.optim import lr_factor
from fastllava.train.deterministic import deterministic_in_words
from fastllava.train.metrics.flops import peak_of
from fastllava_kernels import rooms
from fastllava_kernels.room import SEPARATE

_STEPS_LOOKED_AT = 50
"""Steps that the line about the schedule looks at, in milliseconds each."""


def announce(
    config: Config,
    model: Llava,
    trained: dict[str, nn.Parameter],
    plan: Plan,
    device: torch.device,
    sharding: Sharding,
    say: Say,
) -> None:
    """Say what is trained and frozen, on what data, in which steps, by which optimizer, and how it computes."""
    n_trained = sum(parameter.numel() for parameter in trained.values())
    n_frozen = count(model) - n_trained
    parts = " and ".join(sorted({f"adapters of {name.split('.')[0]}" if is_adapter(name) else name.split(".")[0] for name in trained}))
    rows, supervised = (int(column[plan.trained].sum()) for column in (plan.lengths.n_tokens, plan.lengths.n_supervised))
    optim, train = config.optim, config.train
    projector_lr = optim.lr if optim.projector_lr is None else optim.projector_lr
    trains = f"trains {parts}: {n_trained:,} parameters, kept in {optim.master}"
    fp8 = "" if train.fp8 == "off" else f", decoder's products in fp8 ({train.fp8}{'' if device.type == 'cuda' else ', emulated'})"
    kept = "" if config.model.quantize is None else f", those of the decoder's layers in {config.model.quantize}"
    say(f"{config.stage} on {device}, {train.precision}{fp8}: {trains}; {n_frozen:,} are frozen{kept}")
    say(f"projector: {_projector_in_words(model)}")
    if config.lora.wanted:
        say(f"lora: {_lora_in_words(config.lora)}")
    for note in (*model.origin.notes, *_idle_toggles(config, model)):
        say(f"note: {note}")
    say(f"data: {plan.n_samples:,} samples, {rows:,} tokens with patches, {supervised:,} of them supervised")
    batch = min(train.global_batch, plan.n_samples)
    packed = plan.figures(range(min(plan.n_steps, _STEPS_LOOKED_AT)))
    say(
        f"schedule: {plan.n_steps:,} steps of {batch} samples, about {rows * batch // plan.n_samples:,} tokens each, "
        f"in {packed.micro_batches:.1f} micro-batches of at most {train.micro_batch_tokens:,} tokens"
        + (f" on each of {plan.world} processes, imbalance {packed.imbalance:.3f}" if plan.world > 1 else "")
    )
    say(
        f"optim: AdamW, moments in {optim.state}, lr {optim.lr:g} (projector {projector_lr:g}), weight decay {optim.weight_decay:g}, "
        f"{optim.schedule}, warm-up {optim.warmup_ratio:g}, clipping {optim.max_grad_norm or 'off'}, loss_norm {train.loss_norm}, "
        f"recompute {train.recompute}"
    )
    if device.type == "cuda" and peak_of(device) is None:
        say(f"note: no peak is listed for {torch.cuda.get_device_name(device)}, so mfu and hfu are left out")
    if lr_factor(plan.n_steps - 1, plan.n_steps, optim) == 0.0 and plan.n_steps == 1:
        say("note: the only step is the warm-up's first and runs at lr 0, so no weight moves; write optim.warmup_ratio=0 if it should")
    say(f"compile: {train.compile}; tf32: {'on' if train.tf32 else 'off'}; kernels: {_kernels_in_words(model)}")
    say(deterministic_in_words(config, device, plan.world))
    if device.type == "cuda":
        say(f"memory: {allocator_in_words()}")
    if plan.world > 1:
        say(sharding_in_words(model, sharding))


def _lora_in_words(lora: LoraConfig) -> str:
    dropped = f"{lora.dropped:.6g} of its input dropped" if lora.draws else "nothing dropped"
    return f"rank {lora.rank}, what it adds times {lora.scale:g}, {dropped}; on {', '.join(lora.targets)} of every decoder layer"


def _projector_in_words(model: Llava) -> str:
    """Type and source of the projector, and how a model with it differs from LLaVA-1.5 where it does."""
    kind, patches = kind_of(model.projector.projector_type), model.tower.config.patches
    said = f"{model.projector.projector_type}, {model.projector_source}"
    if model.spec.patches != patches:
        said += f"; {model.spec.patches} tokens an image in place of {patches}"
    return said if kind.remark is None else f"{said}; {kind.remark}: another model than LLaVA-1.5"


def _idle_toggles(config: Config, model: Llava) -> Iterator[str]:
    """A line for each room that the config sets by name and this model does not run; one word for every room sets none by name."""
    if len(set(config.kernels.values())) == 1:
        return
    used, apart = model.kernels(), {name for room in rooms().values() for name in room.parts}
    for name, wanted in config.kernels.items():
        if wanted != "auto" and name not in used and not (wanted == SEPARATE and model.projector.chain() is not None):
            mend = "; it runs with kernels.projector_splice=separate" if name in apart else ""
            yield f"kernels.{name}={wanted} changes nothing, as this model does not run that room{mend}"


def _kernels_in_words(model: Llava) -> str:
    """Each room in use with its implementation and how many modules of each part hold it."""
    return ", ".join(
        f"{room}={use['implementation']} ({' + '.join(f'{count} in {part}' for part, count in use['modules'].items())})"
        for room, use in model.kernels().items()
    )
