"""From folders to a model: which config.json says what, which file holds which tensor, and what does not fit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastllava.batch import ImageSpec
from fastllava.config import LoraConfig, ModelConfig
from fastllava.errors import UserError, or_download
from fastllava.model.architecture import Architecture
from fastllava.model.build import build_llava
from fastllava.model.execution import Execution
from fastllava.model.layers import set_parameter
from fastllava.model.llava import Llava
from fastllava.model.lora import drawn, is_adapter
from fastllava.model.mpt import MptConfig
from fastllava.model.projectors import kind_of
from fastllava.model.towers import TowerConfig
from fastllava.model.weights.adapter_config import ADAPTER_CONFIG
from fastllava.model.weights.adapters import Adapter, is_adapter_folder, read_adapter
from fastllava.model.weights.configs import decoder_config, image_token, text_rows
from fastllava.model.weights.files import TensorFiles, read_json, read_optional_json, without_code
from fastllava.model.weights.fill import fill
from fastllava.model.weights.layouts import Layout, ignored, layout_of, to_ours
from fastllava.model.weights.merging import NOTHING, LowRank
from fastllava.model.weights.tower_configs import image_spec, read_preprocessor, tower_config, vision_part
from fastllava_kernels.room import Sizes


@dataclass(frozen=True, kw_only=True)
class Origin(Architecture):
    """An architecture as folders describe it, and what else they say, kept to be written again beside the weights."""

    layout: Layout
    """The layout of model.llm: a plain LLM, or a whole LLaVA in the original or the llava-hf layout."""
    text: Mapping[str, Any]
    """config.json of the decoder."""
    vision: Mapping[str, Any]
    """config.json of the tower."""
    generation: Mapping[str, Any]
    """generation_config.json."""
    preprocessor: Mapping[str, Any]
    """The image processor's fields."""
    tower_folder: Path | None
    """Where the tower's config.json lies; None for a llava-hf checkpoint that is its own."""
    mm_vision_tower: str | None
    """The name an original checkpoint gives its tower."""
    image_token: int | None
    """The image's id in a llava-hf checkpoint; from there on its vocabulary holds no text."""
    rows: int = 0
    """Rows of embedding and head on disk, where they are more than the decoder has: those beyond hold no text."""
    notes: tuple[str, ...] = ()
    """What was set aside in reading, a line each."""

    @property
    def sizes(self) -> Sizes:
        """What decides which implementations of the ops can run it."""
        widths = {"model.llm": self.llm.attention_width, "model.vision_tower": self.tower.hidden_size // self.tower.num_attention_heads}
        return Sizes(head_widths=widths)


def read_origin(config: ModelConfig, lora: LoraConfig | None = None) -> Origin:
    """What the folders of `config` say, with the adapters of `lora`, without touching a tensor. Raises UserError, as `load_llava`."""
    folder, key = config.llm, "model.llm"
    _refuse_adapter(folder)
    given = read_json(folder / "config.json", key)
    layout = layout_of(given)
    where = f"{key}: {folder}/config.json"
    text: dict[str, Any] = dict(given)
    if layout == "hf":
        text = dict(given.get("text_config") or {})
        text["tie_word_embeddings"] = bool(given.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    rows = text.get("vocab_size")
    if layout == "hf" and isinstance(rows, int):
        text["vocab_size"] = text_rows(given, rows)
    llm = decoder_config(text, where)
    if layout == "hf" and isinstance(llm, MptConfig):
        raise UserError(f"{where}: text_config is an MPT's, which Hugging Face's layout does not hold; give it in the original's layout")
    said = {} if config.adapter is None else read_optional_json(config.adapter / "config.json", "model.adapter")
    described = [(folder, given)] if config.adapter is None else [(folder, given), (config.adapter, said)]
    tower_folder = _find_tower(config, layout, *described)
    if tower_folder is None:
        vision, place = dict(given["vision_config"]), where
        vision.setdefault("model_type", "clip_vision_model")
    else:
        vision, place = read_json(tower_folder / "config.json", "model.vision_tower"), f"model.vision_tower: {tower_folder}/config.json"
    tower = tower_config(vision, place)
    if layout != "llm":
        _check_recipe(config, given, layout, key, folder, tower)
    if config.adapter is not None and said and layout_of(said) == "llava":
        _check_recipe(config, said, "llava", "model.adapter", config.adapter, tower)
    preprocessor = read_preprocessor(tower_folder, "model.vision_tower") if tower_folder else {}
    if not preprocessor and layout == "hf":
        preprocessor = read_preprocessor(folder, key)
    notes = [
        f"{place}: it names code of its own (auto_map), which is not run and not passed on"
        for place, it in ((where, text), (place, vision))
        if without_code(it) != it
    ]
    if isinstance(rows, int) and rows > llm.vocab_size:
        notes.append(f"{where}: rows {llm.vocab_size} to {rows - 1} of embedding and head are the image's and padding; they are left out")
    spec = image_spec(tower, preprocessor, f"model.vision_tower: {tower_folder or folder}")
    return Origin(
        layout=layout,
        text=without_code(text),
        vision=without_code(vision_part(vision)),
        generation=without_code(read_optional_json(folder / "generation_config.json", key)),
        preprocessor=preprocessor,
        tower_folder=tower_folder,
        mm_vision_tower=given.get("mm_vision_tower") or said.get("mm_vision_tower"),
        image_token=image_token(given) if layout == "hf" else None,
        select_layer=config.select_layer,
        lora=lora if lora is not None and lora.wanted else None,
        quantize=config.quantize,
        llm=llm,
        tower=tower,
        projector_type=config.projector_type,
        spec=replace(spec, patches=kind_of(config.projector_type).tokens(tower.patches)),
        rows=rows if isinstance(rows, int) else llm.vocab_size,
        notes=tuple(notes),
    )


def read_image_spec(config: ModelConfig) -> ImageSpec:
    """What the vision tower of `config` wants to see; its kind's published mean and std where its folder has no preprocessor config."""
    return read_origin(config).spec


def load_llava(config: ModelConfig, execution: Execution, seed: int, lora: LoraConfig | None = None, added: LowRank | None = None) -> Llava:
    """The model of `config` on the CPU, every tensor rounded to the dtype of `execution` as it is read, one at a time.

    With the adapters that `lora` asks for: those of model.adapter, or else drawn from `seed`. Without any, those of model.adapter
    are merged into the weights that they lie on as those are read, or `added`, where it is given, in their place. Where model.quantize
    wants it, a weight of the decoder's layers is quantised before the next one is read.

    The projector comes from model.projector, else from model.adapter, else from a whole LLaVA in model.llm, else it is drawn fresh from
    `seed` (`.projector_source` says which). A tower inside a whole LLaVA wins over the one in model.vision_tower.
    Raises UserError when a file cannot be read, or a tensor is missing, unexpected or of another shape.
    """
    origin, dtype = read_origin(config, lora), execution.dtype
    adapter = None if config.adapter is None else read_adapter(config.adapter, "model.adapter")
    going_on: Mapping[str, Tensor] = {}
    if adapter is not None and added is None:
        if origin.lora is not None:
            going_on = adapter.to_go_on_from(origin.lora, origin.llm.num_hidden_layers)
        else:
            added = adapter.to_be_added(origin.llm.num_hidden_layers)
    added = added or NOTHING
    files = TensorFiles(config.llm, "model.llm")
    found = {name: to_ours(name, origin.layout) for name in files.names if not ignored(name)}
    heads = [name for name, ours in found.items() if ours == "llm.lm_head.weight"] if origin.llm.tied else []
    for name in heads:
        del found[name]
    parts = {"llm"} | {str(ours).split(".")[0] for ours in found.values()} & {"tower", "projector"}
    projector = _projector(config, adapter)
    if (config.projector is not None or projector is not None) and "projector" in parts:
        parts.remove("projector")
        found = {name: ours for name, ours in found.items() if not str(ours).startswith("projector.")}
    source = config.llm if "projector" in parts else None if projector is None else projector[0].path
    model = build_llava(origin, execution, "fresh" if source is None else str(source))

    def convert(name: str, tensor: Tensor) -> Tensor:
        return added.merged(name, tensor, dtype)

    added.check({name: parameter.shape for name, parameter in model.named_parameters()}, f"model.llm {config.llm}")
    fill(model, parts, files, found, convert)
    for name in heads:
        if not torch.equal(files.one(name)[: origin.llm.vocab_size].to(dtype), model.llm.head_weight):
            raise UserError(f"model.llm: {config.llm} says tie_word_embeddings and holds another {name}; write tie_word_embeddings: false")
    if "tower" not in parts:
        if origin.tower_folder is None:
            raise UserError(f"model.vision_tower: is missing, and {config.llm} holds no weights of one; give the folder of its tower")
        files = TensorFiles(origin.tower_folder, "model.vision_tower")
        fill(model, {"tower"}, files, {name: to_ours(name, "tower") for name in files.names if not ignored(name)}, convert)
    if projector is not None:
        fill(model, {"projector"}, *projector, convert)
    elif source is None:
        for name, tensor in model.projector.draw(seed).items():
            set_parameter(model.projector, name, nn.Parameter(tensor.to(dtype)))
    for name, parameter in list(model.named_parameters()):
        if is_adapter(name):
            tensor = going_on[name] if name in going_on else drawn(name, parameter.shape, seed)
            if tensor.shape != parameter.shape:
                found, wanted = list(tensor.shape), list(parameter.shape)
                raise UserError(
                    f"model.adapter: {config.adapter} has {name} {found}, where {wanted} is needed; give adapters of {config.llm}"
                )
            set_parameter(model, name, nn.Parameter(tensor.to(dtype, copy=True)))
    return model


def _projector(config: ModelConfig, adapter: Adapter | None) -> tuple[TensorFiles, Mapping[str, str | None]] | None:
    """The files of the projector and our names of its tensors, where it lies outside model.llm and is not to be drawn."""
    if isinstance(config.projector, Path):
        files = TensorFiles(projector_file(config.projector), "model.projector")
        return files, {name: to_ours(name, "projector") for name in files.names}
    if config.projector is None and adapter is not None and adapter.projector_files is not None:
        return adapter.projector_files, adapter.projector_names
    return None


def projector_file(path: Path) -> Path:
    """The projector file at `path`, or in the folder `path`, safetensors before .bin. Raises UserError when there is none."""
    if not path.exists():
        raise UserError(f"model.projector: {path} does not exist; give mm_projector.safetensors or .bin of a pretrain run, or write fresh")
    if path.is_dir():
        for name in ("mm_projector.safetensors", "mm_projector.bin", "non_lora_trainables.bin"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"model.projector: no mm_projector.safetensors and no mm_projector.bin in {path}; give the file of a pretrain run")
    return path


def _find_tower(config: ModelConfig, layout: Layout, *described: tuple[Path, Mapping[str, Any]]) -> Path | None:
    """The folder of the tower's config.json: model.vision_tower, or where an original checkpoint says, or beside it by that name.

    None for a llava-hf checkpoint, which describes its tower itself. `described`: model.llm, and model.adapter where there is one,
    with what their config.json say. Raises UserError when there is none.
    """
    if config.vision_tower is not None:
        return config.vision_tower
    if layout == "hf" and described[0][1].get("vision_config"):
        return None
    told = [(folder, name) for folder, given in described if isinstance(name := given.get("mm_vision_tower"), str) and name]
    if not told:
        raise UserError(
            f"model.vision_tower: is missing, and {config.llm} names no vision tower; give the folder of a CLIP or SigLIP vision model"
        )
    places = []
    for _, name in told:
        beside = [(folder / "vision_tower", folder / name, folder.absolute().parent / Path(name).name) for folder, _ in described]
        places += [Path(name), *chain.from_iterable(beside)]
    for place in places:
        if (place / "config.json").is_file():
            return place
    folder, name = told[0]
    raise UserError(
        f"model.vision_tower: is missing, and the tower {name!r} of {folder} is in none of "
        f"{', '.join(str(place) for place in places)}; give the folder of that tower, or put it there{or_download(Path(name))}"
    )


def _refuse_adapter(folder: Path) -> None:
    """Raises UserError for a LoRA adapter, which is no model by itself, whether or not a config.json lies beside it."""
    if is_adapter_folder(folder):
        base = read_json(folder / ADAPTER_CONFIG, "model.llm").get("base_model_name_or_path")
        raise UserError(
            f"model.llm: {folder} holds a LoRA adapter ({ADAPTER_CONFIG}), trained on {str(base)[:200]!r}, and no whole model; "
            f"write model.adapter={folder}, and the folder of that model as model.llm"
        )


def _check_recipe(config: ModelConfig, given: Mapping[str, Any], layout: Layout, key: str, folder: Path, tower: TowerConfig) -> None:
    """Refuse a whole LLaVA that was trained in a way this model does not compute, or with another setting than the config's."""
    if layout == "hf":
        layer, feature = given.get("vision_feature_layer", -2), given.get("vision_feature_select_strategy", "default")
        kind, patches = "mlp2x_gelu", ("default",) if tower.CLASS_ROWS else ("full",)
    else:
        layer, feature = given.get("mm_vision_select_layer", -2), given.get("mm_vision_select_feature", "patch")
        # The successors of the original take no row away from a tower without a class row, whatever this says.
        kind, patches = given.get("mm_projector_type", "linear"), ("patch",) if tower.CLASS_ROWS else ("patch", "cls_patch")
    if layer != config.select_layer:
        raise UserError(
            f"model.select_layer: {config.select_layer}, but {folder} was trained with {layer}; write model.select_layer={layer}"
        )
    if config.projector is None and kind != config.projector_type:
        raise UserError(f"model.projector_type: {config.projector_type!r}, but {folder} has {kind!r}; write model.projector_type={kind}")
    unsupported = {
        "the class row goes to its projector": tower.CLASS_ROWS > 0 and feature not in patches,
        f"its projector gets other rows than the {tower.NAME} tower's patches ({feature})": not tower.CLASS_ROWS and feature not in patches,
        "it has tokens around its images (mm_use_im_start_end or mm_use_im_patch_token)": any(
            given.get(name) for name in ("mm_use_im_start_end", "mm_use_im_patch_token")
        ),
        "it was trained on several crops an image (anyres)": given.get("mm_patch_merge_type", "flat") != "flat"
        or str(given.get("image_aspect_ratio")).startswith("anyres"),
        "its projector has another activation than gelu": given.get("projector_hidden_act", "gelu") != "gelu",
        "its projector has no bias": not given.get("multimodal_projector_bias", True),
    }
    for what, holds in unsupported.items():
        if holds:
            raise UserError(f"{key}: {folder}/config.json: {what}, which is not supported; give a checkpoint of LLaVA-1.5's kind")
