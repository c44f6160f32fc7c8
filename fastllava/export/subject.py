"""What a checkpoint is: a run's output_dir, its checkpoint-N, or a whole LLaVA checkpoint, and how it was trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllava.config import PROJECTORS, Config, ModelConfig, check_config, projector_name
from fastllava.console.masking import paths_behind
from fastllava.data.templates import TEMPLATES
from fastllava.disk import read_json_object
from fastllava.errors import UserError
from fastllava.export.chat_template import chat_template
from fastllava.model.execution import Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava
from fastllava.model.weights.files import TensorFiles, read_json, read_optional_json
from fastllava.model.weights.layouts import layout_of
from fastllava.model.weights.tower_configs import read_preprocessor
from fastllava.model.weights.write import TEMPLATE_KEY
from fastllava.train.metrics.summary import SUMMARY_FILE, damage_of
from fastllava.train.state.fingerprint import differences, fingerprint

_REMEDY = "give the output_dir of a run, its checkpoint-N, or a whole LLaVA checkpoint"


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


def find_subject(checkpoint: Path, report: Callable[[str], object]) -> Subject:
    """What the folder `checkpoint` is; no weights are read but those of a checkpoint-N. `report` gets a line.

    Raises UserError when it is none of the three, is not whole, or is damaged.
    """
    if not checkpoint.is_dir():
        raise UserError(f"CHECKPOINT: {checkpoint} is no folder; {_REMEDY}")
    if (checkpoint / "manifest.json").is_file() and (checkpoint / "tensors").is_dir():
        from fastllava.train.state.checkpoint import read_model

        run, weights = read_model(checkpoint)
        report(f"{checkpoint} is a checkpoint of stage {run.stage}")
        return replace(_of_run(run, run.model, weights), start=_start(checkpoint / "state.json", run))
    run_config = read_optional_json(checkpoint / "run_config.json", "CHECKPOINT")
    run = check_config(run_config) if run_config else None
    # Of weights alone: a config.json may be mended by hand, as when the tower has moved.
    if (broken := damage_of(checkpoint, (".safetensors", ".bin"))) is not None:
        raise UserError(
            f"CHECKPOINT: {checkpoint} holds the result of a run, but its {broken}; start its training again, which writes the result "
            "again from its last checkpoint, or bring the file back from a copy"
        )
    # Stage pretrain's config.json tells the original's loader of a projector, and has no model beside it.
    if (checkpoint / "config.json").is_file() and not (run is not None and run.stage == "pretrain"):
        return _of_folder(checkpoint, run, report)
    if run is None:
        raise UserError(f"CHECKPOINT: {checkpoint} holds no run_config.json and no config.json; {_REMEDY}")
    projector = checkpoint / "mm_projector.safetensors"
    if not projector.is_file():
        raise UserError(f"CHECKPOINT: the run in {checkpoint} has not ended; let it end, or give one of its checkpoint-N folders")
    report(f"{checkpoint} is the output_dir of stage {run.stage}")
    subject = _of_run(run, run.model.model_copy(update={"projector": projector}), {})
    return replace(subject, start=_start(checkpoint / SUMMARY_FILE, run))


def _start(file: Path, run: Config) -> dict[str, Any]:
    """The fingerprint of the model the run began with; not the weights that trained, which come from elsewhere."""
    try:
        start = read_json_object(file).get("start")
    except (OSError, ValueError):
        return {}
    trained = {"model.projector"} if run.stage == "pretrain" else {"model.projector", "model.llm"}
    parts = {key: part for key, part in start.items() if isinstance(part, dict)} if isinstance(start, dict) else {}
    return {key: {"config": part.get("config"), **({} if key in trained else part)} for key, part in parts.items()}


def _unmasked(model: ModelConfig) -> ModelConfig:
    """`model` with the paths that are here. What looked like a password in them was masked when run_config.json was written."""
    found = {}
    for key in ("llm", "vision_tower", "projector", "tokenizer"):
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


def _of_run(run: Config, model: ModelConfig, weights: dict[str, Tensor]) -> Subject:
    model = _unmasked(model)
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    return Subject(model, weights, dtype, run.data.template, run.data.image_policy, run.data.max_tokens, run.data.legacy)


def _of_folder(folder: Path, run: Config | None, report: Callable[[str], object]) -> Subject:
    """A folder with a config.json: the output_dir of stage finetune, or a checkpoint from elsewhere."""
    given = read_json(folder / "config.json", "CHECKPOINT")
    layout = layout_of(given)
    if layout == "llm":
        raise UserError(f"CHECKPOINT: {folder} holds an LLM without tower and projector; {_REMEDY}")
    kind = given.get("mm_projector_type", "linear") if layout == "llava" else "mlp2x_gelu"
    layer = given.get("mm_vision_select_layer" if layout == "llava" else "vision_feature_layer", -2)
    if projector_name(str(kind)) is None:
        raise UserError(f"CHECKPOINT: {folder}/config.json has the projector {kind!r}; only {', '.join(PROJECTORS)} are supported")
    if not isinstance(layer, int):
        raise UserError(f"CHECKPOINT: {folder}/config.json selects the tower's layers {layer}; only one layer is supported")
    model = ModelConfig(llm=folder, projector_type=kind, select_layer=layer)  # pyright: ignore[reportCallIssue]
    if run is not None:
        report(f"{folder} is the output_dir of stage {run.stage}")
        return _of_run(run, model, {})
    if layout == "llava":
        policy, length = given.get("image_aspect_ratio", "square"), given.get("tokenizer_model_max_length", 2048)
    else:
        policy, length = "pad" if read_preprocessor(folder, "CHECKPOINT").get("do_pad") else "square", _length(folder)
    policy, named = policy if policy == "pad" else "square", _named_template(folder, given)
    known = f"template {named}" if named else "template v1, as it names none"
    report(f"{folder} is a LLaVA checkpoint in layout {layout}; image policy {policy}, and {known}")
    return Subject(model, {}, _stored_dtype(folder), named or "v1", policy, length, None)


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


def load_subject(subject: Subject, report: Callable[[str], object]) -> Llava:
    """The model on the CPU, frozen, in the subject's dtype, computing with the reference of every op.

    Raises UserError when it cannot be read, does not fit, or is not the model that the training began with.
    """
    model = load_llava(subject.model, Execution(reference_ops(), subject.dtype), seed=0)
    if changed := differences(fingerprint(model), subject.start) if subject.start else {}:
        raise UserError(f"CHECKPOINT: it was trained on another model: {'; '.join(changed.values())}; bring back the model of then")
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
