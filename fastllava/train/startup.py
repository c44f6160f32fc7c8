"""What a run does before its first step: choose the device, prepare the data, say what is about to happen."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from fastllava.batch import ImageSpec
from fastllava.config import Config
from fastllava.console.masking import masked
from fastllava.console.printable import printable, quoted
from fastllava.data.marks import check_marks, mark_ids
from fastllava.data.plan import Plan
from fastllava.data.prepared import PreparedSet, prepare
from fastllava.data.templates import template
from fastllava.data.tokenizer import Tokenizer
from fastllava.data.workers import Board
from fastllava.distributed.processes import Processes
from fastllava.errors import UserError
from fastllava.model.llama import LlamaConfig
from fastllava.model.llava import Llava
from fastllava.model.projectors import kind_of
from fastllava.model.weights import read_origin
from fastllava.optim import lr_factor
from fastllava.train.metrics.flops import peak_of
from fastllava.train.state.checkpoint import begun_with
from fastllava_kernels import rooms
from fastllava_kernels.room import SEPARATE

Say = Callable[[str], None]

_STEPS_LOOKED_AT = 50
"""By the line about the plan; milliseconds each."""


def speaker(console: Console) -> Say:
    """Prints a line as it is: no markup, no wrapping, no secret, and nothing in it that a terminal would act on."""
    return lambda text: console.print(printable(masked(text)), highlight=False, soft_wrap=True, markup=False, emoji=False)


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


def check_fp8(config: Config, device: torch.device, world: int) -> None:
    """Raises UserError when `train.fp8` asks for what cannot run on `device`, in `world` processes, or is not installed."""
    recipe = config.train.fp8
    if recipe == "off":
        return
    if world > 1:
        raise UserError(f"train.fp8: '{recipe}' is for a run of one process, not of {world}; write train.fp8=off")
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        version = ".".join(map(str, found))
        raise UserError(f"train.fp8: '{recipe}' needs a GPU of compute capability 8.9 or newer, not {version}; write train.fp8=off")
    try:
        import fastllava.model.fp8  # noqa: F401
    except ImportError as error:
        mend = "run pip install -e '.[torchao]', or write train.fp8=off"
        raise UserError(f"train.fp8: '{recipe}' needs torchao, which cannot be loaded ({error}); {mend}") from None


def check_fp8_widths(config: Config, llm: LlamaConfig) -> None:
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


def load_tokenizer(path: Path, legacy: bool | None, key: str) -> Tokenizer:
    """Tokenizer.load, its errors beginning with the `key` that `path` came from."""
    try:
        return Tokenizer.load(path, legacy)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def prepare_data(config: Config, say: Say, board: Board | None = None, keep: str | None = None) -> tuple[Tokenizer, ImageSpec, PreparedSet]:
    """The tokenizer, what the tower wants to see, and the prepared set, made or reused; what is being read stands on the `board`.

    `keep`: digest of the set that a run began with. Raises UserError when tokenizer, data and decoder do not fit each other,
    before any record is read.
    """
    origin = read_origin(config.model)
    path = config.model.tokenizer or config.model.llm
    tokenizer = load_tokenizer(path, config.data.legacy, "model.tokenizer")
    form = template(config.data.template)
    check_marks(form, tokenizer)
    # A whole LLaVA has no use for the rows of its image and pad token: no text and no template becomes those.
    used = max(tokenizer.text_size, *(index + 1 for index in mark_ids(form, tokenizer).values()), 0)
    if tokenizer.vocab_size > max(origin.rows, origin.llama.vocab_size) or used > origin.llama.vocab_size:
        last = quoted(tokenizer.piece(tokenizer.vocab_size - 1), 40)
        raise UserError(
            f"model.tokenizer: {path} has {tokenizer.vocab_size} tokens (the last is {last}), but model.llm has embeddings for "
            f"{origin.llama.vocab_size}; give the tokenizer that belongs to model.llm"
        )
    if origin.llama.window is not None and config.data.max_tokens > origin.llama.window:
        window = origin.llama.window
        raise UserError(f"data.max_tokens: {config.data.max_tokens} is more than model.llm's attention window; write at most {window}")
    return tokenizer, origin.spec, prepare(config.data, tokenizer, origin.spec, say, board, keep)


def open_data(config: Config, say: Say, processes: Processes, board: Board | None = None) -> tuple[ImageSpec, PreparedSet]:
    """What the tower wants to see, and the prepared set: the first process makes it or finds it, all open it."""

    def prepared() -> tuple[ImageSpec, Path]:
        _, spec, made = prepare_data(config, say, board, begun_with(config.output_dir))
        return spec, made.folder

    spec, folder = processes.on_first(prepared)
    return spec, processes.together(lambda: PreparedSet.open(folder))


def announce(
    config: Config, model: Llava, trained: dict[str, nn.Parameter], prepared: PreparedSet, plan: Plan, device: torch.device, say: Say
) -> None:
    """Say what is trained and frozen, on what data, in which steps, by which optimizer."""
    n_trained = sum(parameter.numel() for parameter in trained.values())
    n_frozen = sum(parameter.numel() for parameter in model.parameters()) - n_trained
    parts = " and ".join(sorted({name.split(".")[0] for name in trained}))
    rows, supervised = int(prepared.n_tokens.sum()), int(prepared.n_supervised.sum())
    optim, train = config.optim, config.train
    projector_lr = optim.lr if optim.projector_lr is None else optim.projector_lr
    trains = f"trains {parts}: {n_trained:,} parameters, kept in {optim.master}"
    fp8 = "" if train.fp8 == "off" else f", decoder's products in fp8 ({train.fp8}{'' if device.type == 'cuda' else ', emulated'})"
    say(f"{config.stage} on {device}, {train.precision}{fp8}: {trains}; {n_frozen:,} are frozen")
    say(f"projector: {_projector_in_words(model)}")
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


def kernels_in_words(model: Llava) -> str:
    """Each room in use with its implementation and how many modules of each part run it."""
    return ", ".join(
        f"{room}={use['implementation']} ({' + '.join(f'{count} in {part}' for part, count in use['modules'].items())})"
        for room, use in model.kernels().items()
    )
