"""What a checkpoint is: a run's output_dir, its checkpoint-N, a whole LLaVA checkpoint or adapters of one, and how it was trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllava.config import Config, LoraConfig, ModelConfig, check_config
from fastllava.console.masking import paths_behind
from fastllava.data.templates import TEMPLATES
from fastllava.disk import read_json_object
from fastllava.errors import UserError
from fastllava.export.base import find_base, llava_of, recipe
from fastllava.export.chat_template import chat_template
from fastllava.model.execution import Execution
from fastllava.model.hashes import hashed
from fastllava.model.llava import Llava
from fastllava.model.lora import is_adapter
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava, read_origin
from fastllava.model.weights.adapters import is_adapter_folder, read_adapter
from fastllava.model.weights.files import TensorFiles, read_json, read_optional_json
from fastllava.model.weights.layouts import layout_of
from fastllava.model.weights.merging import LowRank, Merge
from fastllava.model.weights.tower_configs import read_preprocessor
from fastllava.model.weights.write import TEMPLATE_KEY
from fastllava.train.metrics.summary import SUMMARY_FILE, damage_of
from fastllava.train.state.fingerprint import differences, fingerprint

_REMEDY = "give the output_dir of a run, its checkpoint-N, a whole LLaVA checkpoint, or LoRA adapters of one"


@dataclass(frozen=True)
class Subject:
    """A checkpoint as its files describe it: what to load, and how it was trained."""

    model: ModelConfig
    weights: dict[str, Tensor]
    """Trained weights of a checkpoint-N, to be laid over what `model` loads."""
    dtype: torch.dtype
    template: str
    image_policy: str
    max_tokens: int
    legacy: bool | None
    start: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprint of what `model` must still be, as far as it is known."""
    added: LowRank | None = None
    """Adapters that the checkpoint holds, to be merged into the weights of `model`."""
    lora: LoraConfig | None = None
    """What these adapters are."""


def find_subject(checkpoint: Path, report: Callable[[str], object], base: Path | None = None) -> Subject:
    """What the folder `checkpoint` is; no weights are read but those of a checkpoint-N. `report` gets a line.

    base: the folder of the model that it was trained from, where that is not where `checkpoint` says.
    Raises UserError when it is none of those in `_REMEDY`, is not whole, or is damaged.
    """
    if not checkpoint.is_dir():
        raise UserError(f"CHECKPOINT: {checkpoint} is no folder; {_REMEDY}")
    if (checkpoint / "manifest.json").is_file() and (checkpoint / "tensors").is_dir():
        from fastllava.train.state.checkpoint import read_model

        run, weights = read_model(checkpoint)
        report(f"{checkpoint} is a checkpoint of stage {run.stage}")
        _tell_of_quantised(run, report)
        return _of_weights(checkpoint, run, weights, base)
    run_config = read_optional_json(checkpoint / "run_config.json", "CHECKPOINT")
    run = check_config(run_config) if run_config else None
    # Of weights alone: a config.json may be mended by hand, as when the tower has moved.
    if (broken := damage_of(checkpoint, (".safetensors", ".bin"))) is not None:
        raise UserError(
            f"CHECKPOINT: {checkpoint} holds the result of a run, but its {broken}; start its training again, which writes the result "
            "again from its last checkpoint, or bring the file back from a copy"
        )
    if is_adapter_folder(checkpoint):
        return _of_adapter(checkpoint, run, base, report)
    # Stage pretrain's config.json tells the original's loader of a projector, and has no model beside it.
    if (checkpoint / "config.json").is_file() and not (run is not None and run.stage == "pretrain"):
        if base is not None:
            raise UserError(f"--base: {checkpoint} holds a whole model, which needs no other; leave --base out")
        return _of_folder(checkpoint, run, report)
    if run is None:
        raise UserError(f"CHECKPOINT: {checkpoint} holds no run_config.json and no config.json; {_REMEDY}")
    projector = checkpoint / "mm_projector.safetensors"
    if not projector.is_file():
        raise UserError(f"CHECKPOINT: the run in {checkpoint} has not ended; let it end, or give one of its checkpoint-N folders")
    report(f"{checkpoint} is the output_dir of stage {run.stage}")
    return _of_run(run, _on_base(checkpoint, run, base, projector=projector), _start(checkpoint / SUMMARY_FILE, run))


def _of_weights(checkpoint: Path, run: Config, weights: dict[str, Tensor], base: Path | None) -> Subject:
    """A run's checkpoint-N with these weights: adapters are to be merged, the rest is laid over what the run began with."""
    changes: dict[str, Any] = {}
    if run.lora.wanted:
        # They have been trained on since it gave them.
        changes = {"adapter": None}
    subject = _of_run(run, _on_base(checkpoint, run, base, **changes), _start(checkpoint / "state.json", run))
    if not run.lora.wanted:
        return replace(subject, weights=weights)
    adapters = {name: tensor for name, tensor in weights.items() if is_adapter(name)}
    rest = {name: tensor for name, tensor in weights.items() if name not in adapters}
    return replace(subject, weights=rest, added=LowRank(run.lora.scale, adapters, f"CHECKPOINT: {checkpoint}"), lora=run.lora)


def _of_adapter(checkpoint: Path, run: Config | None, base: Path | None, report: Callable[[str], object]) -> Subject:
    """A folder of adapters: the output_dir of a LoRA run, or the original's, or PEFT's."""
    adapter = read_adapter(checkpoint, "CHECKPOINT")
    if run is not None:
        report(f"{checkpoint} is the output_dir of stage {run.stage}, with adapters of rank {adapter.rank}")
        _tell_of_quantised(run, report)
        model = _on_base(checkpoint, run, base, projector=None, adapter=checkpoint)
        subject = _of_run(run, model, _start(checkpoint / SUMMARY_FILE, run))
    else:
        model, given, folder, layout = llava_of(adapter, find_base(checkpoint, adapter.base, base))
        report(
            f"{checkpoint} holds adapters of rank {adapter.rank} on {model.llm}; scale {adapter.scale:g}, on {', '.join(adapter.targets)}"
        )
        subject = _of_llava(model, given, folder, layout, report)
    llm = read_origin(subject.model).llm
    return replace(subject, added=adapter.to_be_added(llm.num_hidden_layers), lora=adapter.lora)


def _tell_of_quantised(run: Config, report: Callable[[str], object]) -> None:
    if run.model.quantize is not None:
        report(f"its adapters were trained over weights in {run.model.quantize}; they are merged into those weights as they are stored")


def _start(file: Path, run: Config) -> dict[str, Any]:
    """The fingerprint of the model the run began with; not the weights that trained, which come from elsewhere."""
    try:
        start = read_json_object(file).get("start")
    except (OSError, ValueError):
        return {}
    trained = {"model.projector"} if run.stage == "pretrain" or run.lora.wanted else {"model.projector", "model.llm"}
    parts = {key: part for key, part in start.items() if isinstance(part, dict)} if isinstance(start, dict) else {}
    return {key: {"config": part.get("config"), **({} if key in trained else part)} for key, part in parts.items()}


def _unmasked(model: ModelConfig) -> ModelConfig:
    """`model` with the paths that are here. What looked like a password in them was masked when run_config.json was written."""
    found = {}
    for key in ("llm", "vision_tower", "projector", "adapter", "tokenizer"):
        path = getattr(model, key)
        if isinstance(path, Path):
            paths = paths_behind(path)
            if len(paths) != 1:
                raise UserError(
                    f"model.{key}: a part of it was masked in run_config.json, and {len(paths)} paths here match {path}; "
                    "make that very path a link to the one that was trained with"
                )
            found[key] = paths[0]
    return model.model_copy(update=found)


def _on_base(checkpoint: Path, run: Config, base: Path | None, **changes: Any) -> ModelConfig:
    """The model that `run` began with, found again, and these changes to it; its weights as they are stored, however the run kept them."""
    model = run.model if base is None else run.model.model_copy(update={"llm": base})
    model = _unmasked(model)
    return model.model_copy(update={"llm": find_base(checkpoint, str(model.llm), base), "quantize": None, **changes})


def _of_run(run: Config, model: ModelConfig, start: Mapping[str, Any] | None = None) -> Subject:
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    data = run.data
    return Subject(model, {}, dtype, data.template, data.image_policy, data.max_tokens, data.legacy, start or {})


def _of_folder(folder: Path, run: Config | None, report: Callable[[str], object]) -> Subject:
    """A folder with a config.json: the output_dir of stage finetune, or a checkpoint from elsewhere."""
    given = read_json(folder / "config.json", "CHECKPOINT")
    layout = layout_of(given)
    if layout == "llm":
        raise UserError(f"CHECKPOINT: {folder} holds an LLM without tower and projector; {_REMEDY}")
    kind, layer = recipe(given, layout, folder)
    model = ModelConfig(llm=folder, projector_type=kind, select_layer=layer)  # pyright: ignore[reportCallIssue]
    if run is not None:
        report(f"{folder} is the output_dir of stage {run.stage}")
        return _of_run(run, model)
    return _of_llava(model, given, folder, layout, report)


def _of_llava(model: ModelConfig, given: Mapping[str, Any], folder: Path, layout: str, report: Callable[[str], object]) -> Subject:
    """A LLaVA from elsewhere, which the config.json `given` in `folder` describes."""
    if layout == "llava":
        policy, length = given.get("image_aspect_ratio", "square"), given.get("tokenizer_model_max_length", 2048)
    else:
        policy, length = "pad" if read_preprocessor(folder, "CHECKPOINT").get("do_pad") else "square", _length(folder)
    policy, named = policy if policy == "pad" else "square", _named_template(folder, given)
    known = f"template {named}" if named else "template v1, as it names none"
    what = "is a LLaVA checkpoint" if model.adapter is None else "describes a LLaVA"
    report(f"{folder} {what} in layout {layout}; image policy {policy}, and {known}")
    return Subject(model, {}, _stored_dtype(model.llm), named or "v1", policy, length, None)


def _length(folder: Path) -> int:
    """The length that a checkpoint in layout hf was trained with: its tokenizer's, where that is one, else the original's."""
    given = read_optional_json(folder / "tokenizer_config.json", "CHECKPOINT").get("model_max_length")
    # transformers writes 10^30 where nothing was said.
    return given if isinstance(given, int) and 0 < given < 10**6 else 2048


def _named_template(folder: Path, given: Mapping[str, Any]) -> str | None:
    """The template that its config.json names, or that its chat template writes, where it is one of ours."""
    if isinstance(name := given.get(TEMPLATE_KEY), str) and name in TEMPLATES:
        return name
    try:
        written = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return next((name for name, form in TEMPLATES.items() if chat_template(form) == written), None)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that holds every tensor of the checkpoint."""
    found: torch.dtype | None = None
    for _, tensor in TensorFiles(folder, "CHECKPOINT").stream():
        if tensor.is_floating_point():
            found = tensor.dtype if found is None else torch.promote_types(found, tensor.dtype)
    return found or torch.float32


def check_start(subject: Subject) -> None:
    """Raises UserError where the model that the training began with, in the subject's dtype, is not the one of then."""
    if subject.start:
        _begun_with(subject, "fp32")


def _begun_with(subject: Subject, merge: Merge) -> Llava:
    """The model that the training began with, with the subject's adapters merged into it. Raises UserError as `load_subject`."""
    before: dict[str, str] = {}
    added = subject.added
    if added is not None:
        added = replace(added, how=merge, before=lambda name, weight: before.update({name: hashed(weight)}))
    model = load_llava(subject.model, Execution(reference_ops(), subject.dtype), seed=0, added=added)
    if changed := differences(fingerprint(model, before=before), subject.start) if subject.start else {}:
        raise UserError(f"CHECKPOINT: it was trained on another model: {'; '.join(changed.values())}; bring back the model of then")
    return model


def load_subject(subject: Subject, report: Callable[[str], object], merge: Merge = "fp32") -> Llava:
    """The model on the CPU, frozen, in the subject's dtype, computing with the reference of every op; adapters merged as `merge` says.

    Raises UserError when it cannot be read, does not fit, or is not the model that the training began with.
    """
    model = _begun_with(subject, merge)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in subject.weights.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                llm = subject.model.llm
                raise UserError(f"CHECKPOINT: its {name} {list(tensor.shape)} does not fit {llm}; restore the model it was trained from")
            parameters[name].copy_(tensor)
    model.requires_grad_(False)
    tower = model.origin.tower_folder or subject.model.llm
    for note in model.origin.notes:
        report(f"note: {note}")
    report(f"read {sum(p.numel() for p in parameters.values()):,} parameters; the vision tower's config.json is {tower}'s")
    return model
