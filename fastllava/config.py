"""The configuration of a run: YAML plus `key=value` overrides, checked as a whole before anything starts.

`load_config` merges the stage's defaults (the official recipe), the file and the overrides, in this order.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastllava.errors import UserError
from fastllava_kernels import rooms

Stage = Literal["pretrain", "finetune"]

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

FilePath = Annotated[Path, Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelConfig(Section):
    """What is trained."""

    llm: FilePath = Field(description="folder of a Llama-family model, or of a whole LLaVA checkpoint (original or Hugging Face layout)")
    vision_tower: FilePath | None = Field(None, description="folder of a CLIP vision model; may be left out when model.llm holds one")
    projector: FilePath | Literal["fresh"] | None = Field(
        None, description="mm_projector.safetensors or .bin to begin with; 'fresh' draws a new one, which stage pretrain does anyway"
    )
    projector_type: str = Field(
        "mlp2x_gelu", pattern=r"^(linear|identity|mlp[1-9]\d*x_gelu)$", description="linear, mlpNx_gelu or identity"
    )
    select_layer: int = Field(-2, description="hidden state of the tower that feeds the projector; -2 is before the last block")
    tokenizer: FilePath | None = Field(None, description="tokenizer folder or file; model.llm's when left out")


class DataConfig(Section):
    """What it is trained on."""

    records: FilePath = Field(description="LLaVA JSON: an array, or one record a line (.jsonl)")
    images: FilePath | None = Field(None, description="the folder that the records' image paths start from")
    image_policy: Literal["square", "pad"] = Field(description="square: centre crop; pad: pad to a square with the mean colour")
    template: str = Field(description="conversation template, such as plain or v1")
    max_tokens: int = Field(2048, ge=2, description="a sample is cut here, counted after the image has become patches")
    shuffle: bool = Field(True, description="false: the order of the file")
    group_by_modality: bool = Field(
        description="samples of one modality and of similar length share a step, as the original's sampler draws them"
    )
    legacy: bool | None = Field(
        None, description="sentencepiece pieces after a special token: legacy or not; read from the tokenizer's config when left out"
    )
    max_quarantined_share: Share = Field(0.01, description="more bad records than this share stop the run before it starts")
    prepared_dir: FilePath | None = Field(None, description="where prepared sets are kept; ~/.cache/fastllava/prepared when left out")
    workers: int = Field(2, ge=0, description="processes that prepare records, and that decode images during training")
    max_image_bytes: int = Field(64 * 2**20, gt=0, description="larger image files are quarantined")
    max_image_pixels: int = Field(50_000_000, gt=0, description="images of more pixels are quarantined")
    min_image_side: int = Field(4, ge=1, description="images with a shorter side are quarantined")
    max_image_aspect: float = Field(50.0, ge=1, description="images longer than this many times their width are quarantined")


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(gt=0)
    projector_lr: float | None = Field(None, ge=0, description="a learning rate of its own for the projector")
    weight_decay: float = Field(0.0, ge=0)
    warmup_ratio: Share = Field(0.03, description="share of the steps, rounded up, with a linearly rising rate; step 0 runs at rate 0")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: float | None = Field(None, gt=0, description="clip the gradient norm here; the official recipe does not clip")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)


class TrainConfig(Section):
    """How it is trained."""

    global_batch: int = Field(ge=1, description="samples of one optimizer step, whatever the hardware")
    reference_micro_batch: int = Field(ge=1, description="samples of the original's micro-batch; only loss_norm=llava looks at it")
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, in place of train.epochs; the schedule ends there too")
    seed: int = Field(42, ge=0, lt=2**63)
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 computes in bf16 and keeps fp32 master weights")
    loss_norm: Literal["token", "llava"] = Field(
        "token", description="token: mean over the step's supervised tokens; llava: the original's mean of means"
    )
    micro_batch_tokens: int = Field(
        16384, ge=1, description="rows of one packed micro-batch; a step takes as many micro-batches as it needs"
    )
    recompute: Literal["none", "full"] = Field(
        "none", description="full: keep only each decoder layer's input and compute the rest again in backward"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_steps: int | None = Field(None, ge=1, description="a checkpoint every so many steps")
    checkpoint_minutes: float | None = Field(30.0, gt=0, description="a checkpoint every so many minutes")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept; older ones go")


class LogConfig(Section):
    """Where metrics go besides metrics.jsonl."""

    backends: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    project: str = "fastllava"


class Config(Section):
    """A whole run. `load_config` makes one."""

    stage: Stage
    output_dir: FilePath
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    kernels: dict[str, str] = Field(default_factory=dict, description="implementation by room; 'reference' alone means every room")
    log: LogConfig = Field(default_factory=LogConfig)

    @field_validator("kernels", mode="before")
    @classmethod
    def _one_word_for_all(cls, value: Any) -> Any:
        return dict.fromkeys(rooms(), value) if isinstance(value, str) else value

    @field_validator("kernels")
    @classmethod
    def _known_rooms(cls, value: dict[str, str]) -> dict[str, str]:
        for name, wanted in value.items():
            if name not in rooms():
                raise ValueError(f"no room '{name}'{_did_you_mean(name, rooms())}")
            names = ["auto", *rooms()[name].implementations]
            if wanted not in names:
                raise ValueError(f"room {name} has no implementation '{wanted}'; write one of {', '.join(names)}")
        return {name: value.get(name, "auto") for name in rooms()}

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "Config":
        if self.train.loss_norm == "llava" and self.train.global_batch % self.train.reference_micro_batch:
            raise ValueError(
                f"train.reference_micro_batch: {self.train.reference_micro_batch} does not divide "
                f"train.global_batch {self.train.global_batch}; train.loss_norm=llava needs whole micro-batches"
            )
        return self


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses a key given twice."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]  # pyright: ignore[reportUnknownMemberType]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration from the YAML file at `path` and `key=value` words such as `optim.lr=2e-5`.

    Raises UserError that lists every problem, each in one line that names the key, what was given and what to write.
    """
    try:
        given = _parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the path of a YAML config") from None
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise UserError(f"{path}: holds a {type(given).__name__}; a config is a mapping of keys such as 'stage: pretrain'")
    for word in overrides:
        _set_override(given, word)
    return check_config(given)


def check_config(given: Mapping[str, Any]) -> Config:
    """A Config from a plain mapping; the stage's defaults fill what it leaves out. Raises UserError like `load_config`."""
    defaults = STAGE_DEFAULTS.get(str(given.get("stage")), {})
    merged: dict[str, Any] = dict(given)
    for section in (*defaults, *(name for name in ("model", "data", "optim", "train") if name not in defaults)):
        value = merged.get(section) or {}
        merged[section] = {**defaults.get(section, {}), **value} if isinstance(value, Mapping) else value
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        # Without a stage there are no defaults, and complaints about missing keys would hide the one that matters.
        known_stage = bool(defaults)
        problems = [e for e in error.errors() if known_stage or e["type"] != "missing" or e["loc"] == ("stage",)]
        raise UserError("\n".join(dict.fromkeys(_in_words(problem) for problem in problems))) from None


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted config key, such as 'optim.lr'."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _set_override(given: dict[str, Any], word: str) -> None:
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise UserError(f"override '{word}': is not of the form key=value; write for example optim.lr=2e-5")
    *sections, name = key.split(".")
    target = given
    for section in sections:
        inner = target.get(section)
        if section == "kernels" and isinstance(inner, str):
            inner = dict.fromkeys(rooms(), inner)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"override '{word}': '{section}' holds the value {inner!r}, no keys of its own")
        target[section] = target = dict(inner)
    target[name] = _parse_yaml(text, f"override '{word}'")


def _in_words(problem: Any) -> str:
    """One pydantic problem as 'key: what was given; what to write instead'."""
    key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("function-", "literal", "constrained")))
    given = problem.get("input")
    match problem["type"]:
        case "missing":
            return f"{key}: is missing; write it in the config or as {key}=VALUE"
        case "extra_forbidden":
            return f"{key}: no such key{_did_you_mean(key, keys())}"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{key}: {message}" if key else message
        case "literal_error":
            return f"{key}: {given!r} is not one of {problem['ctx']['expected']}"
        case "string_pattern_mismatch" if key == "model.projector_type":
            return f"{key}: {given!r} is no projector; write linear, identity or mlpNx_gelu, such as mlp2x_gelu"
        case _:
            return f"{key}: {given!r} does not fit: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _did_you_mean(word: str, known: Any) -> str:
    known = list(known)
    by_name = [key for key in known if key.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    close = by_name or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; the keys beside it: {', '.join(_siblings(word, known))}"


def _siblings(word: str, known: Sequence[str]) -> list[str]:
    prefix = word.rpartition(".")[0]
    return [key for key in known if key.rpartition(".")[0] == prefix] or sorted({key.split(".")[0] for key in known})
