"""The keys of a run's configuration: every section with its fields, their types, defaults and rules."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from fastllava.config.lora import LoraConfig
from fastllava.config.problems import did_you_mean
from fastllava.config.section import FilePath, Section, Share, as_path
from fastllava.config.strict_yaml import in_yaml
from fastllava.console.printable import shortened
from fastllava_kernels import rooms

Stage = Literal["pretrain", "finetune"]
Recompute = Literal["none", "norms", "selective", "full"]
Rows = Literal["supervised", "all"]
"""The rows of a sequence that something is computed for."""

PROJECTORS: Mapping[str, str] = {
    "linear": "linear",
    "mlpNx_gelu": r"mlp[1-9]\d*x_gelu",
    "identity": "identity",
    "mlp_downsample": "mlp_downsample",
}
"""Every kind of projector by its name, with the pattern of `model.projector_type`; `model.projectors` builds them."""


def projector_name(projector_type: str) -> str | None:
    """The name in `PROJECTORS` whose pattern `projector_type` fits, or None."""
    return next((name for name, pattern in PROJECTORS.items() if re.fullmatch(pattern, projector_type)), None)


# Recipe of scripts/v1_5/{pretrain,finetune}.sh of the original (haotian-liu/LLaVA, c121f04).
STAGE_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "pretrain": {
        "data": {"template": "plain", "image_policy": "square", "group_by_modality": False},
        "optim": {"lr": 1e-3},
        "train": {"global_batch": 256, "reference_micro_batch": 32},
    },
    "finetune": {
        "data": {"template": "v1", "image_policy": "pad", "group_by_modality": True},
        "optim": {"lr": 2e-5},
        "train": {"global_batch": 128, "reference_micro_batch": 16},
    },
}

SECTIONS = ("model", "data", "lora", "optim", "train", "eval", "kernels", "parallel", "log")


def _as_share_or_path(value: Any) -> float | Path | None:
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return as_path(value)
    if not 0 < value < 1:
        raise ValueError(f"{in_yaml(value)} is no share of the records; write one between 0 and 1, such as 0.01, or a file of records")
    return float(value)


def _as_count_or_path(value: Any) -> int | Path | None:
    if value is None or isinstance(value, Path):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return as_path(value)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{in_yaml(value)} is no number of records; write one such as 8, or a file of questions")
    return value


def _as_truth_or_word(value: Any) -> Any:
    if isinstance(value, bool | str):
        return value
    raise ValueError(f"{in_yaml(value)} is none of auto, true and false")


MOST_IMAGES = 100
"""Pictures that a record may show at the very most; with LLaVA-1.5's 576 patches each, data.max_tokens lets three in whole."""
SAME_TRAINING = "same training"
"""Marks a key whose values give the same training in another order of additions."""
LEVER = "lever"
"""Marks a key whose values trade accuracy for memory or time: another training, so a run never resumes with another value."""
Compile = Literal["off", "layer", "step"]
Deterministic = Literal["auto", True, False]
Quantize = Literal["nf4", "nf4_double"]
Fp8 = Literal["off", "tensorwise", "rowwise", "rowwise_with_gw_hp"]


class ModelConfig(Section):
    """What is trained."""

    llm: FilePath = Field(description="folder of a language model, or of a whole LLaVA checkpoint (original or Hugging Face layout)")
    vision_tower: FilePath | None = Field(None, description="folder of a CLIP or SigLIP; may be left out when model.llm holds one")
    projector: Literal["fresh"] | FilePath | None = Field(
        None, description="mm_projector.safetensors or .bin to begin with; 'fresh' draws a new one, which stage pretrain does anyway"
    )
    projector_type: str = Field(
        "mlp2x_gelu",
        description=f"{', '.join(PROJECTORS)}; mlp2x_gelu is LLaVA-1.5's",
        json_schema_extra={"pattern": f"^({'|'.join(PROJECTORS.values())})$"},
    )
    quantize: Quantize | None = Field(
        None,
        description="the frozen weights of the decoder's layers in four bits, under adapters (QLoRA); nf4_double: their scales in 8",
    )
    select_layer: int = Field(-2, description="hidden state of the tower that feeds the projector; -2 is before the last block")
    adapter: FilePath | None = Field(
        None, description="folder of LoRA adapters on model.llm: what lora.rank goes on from; merged into its weights where there is none"
    )
    tokenizer: FilePath | None = Field(None, description="tokenizer folder or file; model.llm's when left out")

    @field_validator("projector_type")
    @classmethod
    def _known_projector(cls, value: str) -> str:
        if projector_name(value) is None:
            raise ValueError(f"{in_yaml(value)} is no projector; write one of {', '.join(PROJECTORS)}; mlp2x_gelu is LLaVA-1.5's")
        return value


class DataConfig(Section):
    """What it is trained on."""

    records: FilePath = Field(description="LLaVA JSON: an array, or one record a line (.jsonl)")
    images: FilePath | None = Field(None, description="the folder that the records' image paths start from")
    image_policy: Literal["square", "pad"] = Field(description="square: centre crop; pad: pad to a square with the mean colour")
    template: str = Field(description="conversation template, such as plain or v1; auto: the one that belongs to the model")
    max_tokens: int = Field(2048, ge=2, description="a sample is cut here, counted after the image has become patches")
    shuffle: bool = Field(True, description="false: the order of the file")
    group_by_modality: bool = Field(
        description="samples of one modality and of similar length share a step, as the original's sampler draws them"
    )
    legacy: bool | None = Field(
        None, description="sentencepiece pieces after a special token: legacy or not; read from the tokenizer's config when left out"
    )
    max_quarantined_share: Share = Field(0.01, description="more bad records than this share stop the run before it starts")
    follow_links: bool = Field(False, description="true: links in data.images may lead out of it, to another disk, say")
    prepared_dir: FilePath | None = Field(None, description="where prepared sets are kept; ~/.cache/fastllava/prepared when left out")
    workers: int = Field(2, ge=0, description="processes that prepare records, and that decode images during training")
    image_hashes: bool = Field(
        False,
        description="true: every image is hashed when it is read for training, too, so that bits that rot on the disk are seen; about "
        "0.1 ms an image. Otherwise only where its size or time has changed",
    )
    image_checksums: FilePath | None = Field(
        None, description="a list by sha256sum, paths as in the records: images that are not as listed are quarantined"
    )
    max_images: int = Field(
        1, ge=1, le=MOST_IMAGES, description="pictures a record may show, as a list under 'image'; records with more are quarantined"
    )
    max_image_bytes: int = Field(64 * 2**20, gt=0, description="larger image files are quarantined")
    max_image_pixels: int = Field(50_000_000, gt=0, description="images of more pixels are quarantined")
    min_image_side: int = Field(4, ge=1, description="images with a shorter side are quarantined")
    max_image_aspect: float = Field(50.0, ge=1, description="images longer than this many times their width are quarantined")


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(gt=0, description="the highest learning rate, which the schedule rises to and falls from")
    projector_lr: float | None = Field(None, ge=0, description="a learning rate of its own for the projector")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay, of matrices and embeddings; biases and norms have none")
    warmup_ratio: Share = Field(0.03, description="share of the steps, rounded up, with a linearly rising rate; step 0 runs at rate 0")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate falls after the warm-up")
    max_grad_norm: float | None = Field(None, gt=0, description="clip the gradient norm here; the official recipe does not clip")
    beta1: float = Field(0.9, ge=0, lt=1, description="how much of AdamW's first moment a step keeps")
    beta2: float = Field(0.999, ge=0, lt=1, description="how much of AdamW's second moment a step keeps")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    state: Annotated[Literal["fp32", "8bit"], LEVER] = Field(
        "fp32", description="AdamW's moments: fp32, or 8bit, quantised in blocks by torchao, for one process: 6 bytes a parameter less"
    )
    master: Annotated[Literal["fp32", "bf16"], LEVER] = Field(
        "fp32",
        description="what trains is kept in fp32, or in bf16 alone, rounded at random, for one process: 2 to 4 bytes a parameter less",
    )


class TrainConfig(Section):
    """How it is trained."""

    global_batch: int = Field(ge=1, description="samples of one optimizer step, whatever the hardware")
    reference_micro_batch: int = Field(ge=1, description="samples of the original's micro-batch; only loss_norm=llava looks at it")
    epochs: int = Field(1, ge=1, description="how often every sample is seen")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, in place of train.epochs; the schedule ends there too")
    seed: int = Field(42, ge=0, lt=2**63, description="draws the order of the samples and a new projector")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 computes in bf16 and keeps fp32 master weights")
    loss_norm: Literal["token", "llava"] = Field(
        "token", description="token: mean over the step's supervised tokens; llava: the original's mean of means"
    )
    micro_batch_tokens: Annotated[int, SAME_TRAINING] = Field(
        16384, ge=1, description="tokens of one packed micro-batch, patches included; a step takes as many micro-batches as it needs"
    )
    recompute: Annotated[Recompute, SAME_TRAINING] = Field(
        "none",
        description="what of each decoder layer backward computes again, for memory: nothing (none), all but matrix products and attention "
        "(norms), the MLP too (selective), or everything but the layer's input (full)",
    )
    last_layer: Annotated[Rows, SAME_TRAINING] = Field(
        "supervised",
        description="tokens whose queries and MLP the decoder's last layer computes: supervised, as nothing reads the others, or all",
    )
    compile: Annotated[Compile, SAME_TRAINING] = Field(
        "off", description="torch.compile of nothing (off), of each decoder layer and tower block (layer), or of the whole forward (step)"
    )
    tf32: Annotated[bool, SAME_TRAINING] = Field(
        False, description="true: matrix products in fp32 may take TF32, which keeps 10 bits of each factor; those in bf16 are as they are"
    )
    deterministic: Annotated[Deterministic, BeforeValidator(_as_truth_or_word), SAME_TRAINING] = Field(
        "auto",
        description="true: every op adds in one order, so that a run that is killed and resumed is bit for bit the unbroken one; auto and "
        "false: a GPU adds in any order where that is faster, which is in attention's backward, and a resumed run equals the unbroken one "
        "up to rounding; on a CPU it is bit for bit in any case",
    )
    fp8: Annotated[Fp8, LEVER] = Field(
        "off",
        description="torchao's recipe for products of the decoder's layers in fp8, for one process; on a GPU of compute capability 8.9 or "
        "newer, emulated on a CPU; best with train.compile",
    )
    skip_spikes: bool = Field(
        False, description="true: nothing moves in a step whose loss or gradient norm is more than 6 sigma above the last 128 steps"
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], SAME_TRAINING] = Field(
        "auto", description="where it trains; auto: a GPU when there is one"
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="a checkpoint every so many steps")
    checkpoint_minutes: float | None = Field(30.0, gt=0, description="a checkpoint every so many minutes")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept; older ones go")
    watchdog_seconds: float | None = Field(
        60.0,
        ge=0,
        description="a run in which nothing moves for so long (a data worker or process that is stopped, a file that is never read) "
        "writes its stacks and ends with exit code 75; 0 or null: it waits for ever",
    )


class EvalConfig(Section):
    """What is looked at while it trains. Nothing here changes the training, but for a share of the records, which is taken out of it."""

    held_out: Annotated[Annotated[float, Field(gt=0, lt=1)] | Path | None, BeforeValidator(_as_share_or_path)] = Field(
        default=None,
        description="records that are never trained on, to tell the loss of: a share of data.records, such as 0.01, drawn by train.seed, "
        "or a file like data.records, with images below data.images",
    )
    every_steps: int | None = Field(
        default=None, ge=1, description="evaluate before the first step, every so many steps and at the end; when left out at the end alone"
    )
    samples: Annotated[Annotated[int, Field(ge=1)] | Path | None, BeforeValidator(_as_count_or_path)] = Field(
        default=None,
        description="questions to answer greedily: the first ones of so many records, of held-out ones where there are any, or a file of "
        "JSON objects with question_id, text and perhaps image, one a line, with images below data.images",
    )
    max_new_tokens: int = Field(default=32, ge=1, description="tokens of an answer to eval.samples; it is cut there")

    @property
    def share(self) -> float | None:
        """The share of data.records that is held out; None where none of them is."""
        return self.held_out if isinstance(self.held_out, float) else None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.held_out is not None or self.samples is not None

    @model_validator(mode="after")
    def _something_to_evaluate(self) -> "EvalConfig":
        if self.every_steps is not None and not self.wanted:
            raise ValueError(
                "eval.every_steps: there is nothing to evaluate; write eval.held_out=0.01, say, or eval.samples=8, or leave it out"
            )
        return self


class ParallelConfig(Section):
    """How several processes, as torchrun starts them, share the work. Without torchrun nothing here matters."""

    frozen: Annotated[Literal["auto", "replicate", "shard"], SAME_TRAINING] = Field(
        default="auto",
        description="the decoder that stage pretrain does not train: whole on every GPU, or sharded; auto replicates what takes at most "
        "two fifths of a GPU's memory. The tower is always whole",
    )
    reshard: Annotated[bool, SAME_TRAINING] = Field(
        default=True, description="true: a layer's weights are gathered for its forward and again for its backward; false: kept in between"
    )
    reduce: Annotated[Literal["micro_batch", "step"], SAME_TRAINING] = Field(
        default="micro_batch",
        description="gradients are summed over the processes after every micro-batch, beside its backward, or once a step, "
        "which keeps a whole fp32 gradient on every GPU",
    )
    gather: Annotated[Literal["kernels", "copy_engine"], SAME_TRAINING] = Field(
        default="kernels",
        description="what carries sharded weights between GPUs: kernels, which take multiprocessors from the computing beside them, or "
        "copy engines, by NCCL's symmetric memory, where PyTorch's FSDP has that",
    )
    replicas: Annotated[int, SAME_TRAINING] = Field(
        default=1, ge=1, description="groups that each hold one whole sharded copy, such as one a node (HSDP); a divisor of the processes"
    )


class LogConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    backends: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="trackers to send the metrics to as well; each is an extra of the package"
    )
    project: str = Field(default="fastllava", description="the project's name at the trackers")


class Config(Section):
    """A whole run. `load_config` makes one."""

    stage: Stage = Field(description="pretrain trains the projector alone; finetune trains projector and language model")
    output_dir: FilePath = Field(description="the folder for everything that the run leaves; the same command goes on with the run in it")
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)
    kernels: dict[str, str] = Field(
        default_factory=dict, validate_default=True, description="implementation by room; 'reference' alone means every room"
    )
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @field_validator("kernels", mode="before")
    @classmethod
    def _one_word_for_all(cls, value: Any) -> Any:
        return dict.fromkeys(rooms(), value) if isinstance(value, str) else value

    @field_validator("kernels")
    @classmethod
    def _known_rooms(cls, value: dict[str, str]) -> dict[str, str]:
        problems = []
        for name, wanted in value.items():
            if name not in rooms():
                problems.append(
                    f"kernels.{shortened(name, 80)}: no such room{did_you_mean(f'kernels.{name}', [f'kernels.{room}' for room in rooms()])}"
                )
            elif wanted not in (names := rooms()[name].values):
                problems.append(f"kernels.{name}: {in_yaml(wanted)} is no implementation of it; write one of {', '.join(names)}")
        if problems:
            raise ValueError("\n".join(problems))
        return {name: value.get(name, "auto") for name in rooms()}

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "Config":
        if self.train.loss_norm == "llava" and self.train.global_batch % self.train.reference_micro_batch:
            raise ValueError(
                f"train.reference_micro_batch: {self.train.reference_micro_batch} does not divide train.global_batch "
                f"{self.train.global_batch}, and train.loss_norm=llava needs whole micro-batches; write a divisor of it"
            )
        return self

    @model_validator(mode="after")
    def _lora_has_a_rank_and_a_stage(self) -> "Config":
        lora = self.lora
        if not lora.wanted and lora != LoraConfig():
            given = next(name for name in LoraConfig.model_fields if getattr(lora, name) != getattr(LoraConfig(), name))
            value = in_yaml(getattr(lora, given))
            raise ValueError(f"lora.{given}: {value}, but there is no lora.rank; write lora.rank=128, say, or leave lora out")
        if lora.wanted and self.stage == "pretrain":
            raise ValueError(
                f"lora.rank: {lora.rank}, but stage pretrain trains the projector alone; write lora.rank=null, or stage=finetune"
            )
        if len(set(lora.targets)) < len(lora.targets):
            twice = next(name for name in lora.targets if lora.targets.count(name) > 1)
            raise ValueError(f"lora.targets: names {twice} twice; write it once")
        if lora.wanted and self.train.fp8 != "off":
            raise ValueError(f"train.fp8: '{self.train.fp8}' does not go with adapters (lora.rank={lora.rank}); write train.fp8=off")
        return self

    @model_validator(mode="after")
    def _quantised_weights_are_frozen_and_whole(self) -> "Config":
        quantize = self.model.quantize
        if quantize is not None and not self.lora.wanted:
            instead = "lora.rank=128, say, or model.quantize=null" if self.stage == "finetune" else "model.quantize=null"
            raise ValueError(f"model.quantize: '{quantize}' is for frozen weights under adapters, and there are none; write {instead}")
        if quantize is not None and self.parallel.frozen == "shard":
            raise ValueError(f"parallel.frozen: 'shard', but weights in '{quantize}' are not cut; write parallel.frozen=replicate")
        return self

    @model_validator(mode="after")
    def _levers_want_bf16(self) -> "Config":
        if self.optim.master == "bf16" and self.train.precision == "fp32":
            raise ValueError("optim.master: 'bf16' is less than train.precision=fp32 computes in; write optim.master=fp32")
        if self.train.fp8 != "off" and self.train.precision == "fp32":
            raise ValueError(f"train.fp8: '{self.train.fp8}' replaces bf16 products; write train.precision=bf16, or train.fp8=off")
        return self


def key_names(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted config key, such as 'optim.lr'."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from key_names(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def default_values(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key that has a default, and it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from default_values(field.annotation, f"{prefix}{name}.")
        elif field.default is not None and not field.is_required():
            yield f"{prefix}{name}", field.default


def same_training() -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key whose value changes the order of additions at most, but for `kernels`, with its field."""
    return marked(SAME_TRAINING)


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def without_levers(config: Config) -> Config:
    """`config` with every lever at its default: the recipe's own training."""
    changes: dict[str, dict[str, Any]] = {}
    for key, field in marked(LEVER):
        section, _, name = key.partition(".")
        changes.setdefault(section, {})[name] = field.default
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values) for section, values in changes.items()})


def marked(mark: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with this mark, and its field."""
    for section in SECTIONS:
        model = Config.model_fields[section].annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            yield from ((f"{section}.{name}", field) for name, field in model.model_fields.items() if mark in field.metadata)
