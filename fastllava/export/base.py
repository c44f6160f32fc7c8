"""The model that adapters lie on: where it is, and what it and the adapters' folder say of how they were trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllava.config import PROJECTORS, ModelConfig, projector_name
from fastllava.errors import UserError, or_download
from fastllava.model.weights.adapters import Adapter, is_adapter_folder
from fastllava.model.weights.files import read_json, read_optional_json
from fastllava.model.weights.layouts import Layout, layout_of

CONFIG = "config.json"


def find_base(checkpoint: Path, named: str | None, given: Path | None) -> Path:
    """The folder of the model that `checkpoint` was trained from: `given` (`--base`), or where it says, or in or beside it by that name.

    Raises UserError, which says how to name it, when it is not there, or is no whole model.
    """
    if given is not None:
        if not _holds_a_config(given):
            raise UserError(f"--base: {given} holds no {CONFIG}; give the folder of the model that {checkpoint} was trained from")
        places = [given]
    else:
        places = []
        if named is not None:
            within, beside = checkpoint.absolute(), checkpoint.absolute().parent
            places = [Path(named), within / Path(named).name, beside / named, beside / Path(named).name]
        places = list(dict.fromkeys(places))
    for place in places:
        if _holds_a_config(place):
            if is_adapter_folder(place):
                merge = f"merge it first (fastllava export {place} --layout llava --out DIR) and write --base DIR"
                raise UserError(f"CHECKPOINT: {checkpoint} was trained from {place}, which holds adapters itself; {merge}")
            return place
    if named is None:
        raise UserError(f"CHECKPOINT: {checkpoint} does not say from what model it was trained; name the folder of that with --base DIR")
    looked_at = ", ".join(str(place)[:200] for place in places)
    raise UserError(
        f"CHECKPOINT: {checkpoint} was trained from {named[:200]!r}, which is in none of {looked_at}; name its folder with --base DIR"
        f"{or_download(Path(named))}"
    )


def _holds_a_config(place: Path) -> bool:
    try:
        return (place / CONFIG).is_file()
    except OSError:  # a name that no file system takes
        return False


def llava_of(adapter: Adapter, base: Path) -> tuple[ModelConfig, Mapping[str, Any], Path, Layout]:
    """The LLaVA that `adapter` makes of `base`; the config.json that describes it, the folder that this lies in, and its layout.

    Raises UserError when tower or projector are known from neither.
    """
    said, of_base = read_optional_json(adapter.folder / CONFIG, "CHECKPOINT"), read_json(base / CONFIG, "--base")
    own = bool(said) and layout_of(said) == "llava"
    given, folder = (said, adapter.folder) if own else (of_base, base)
    layout = layout_of(given)
    if layout == "llm":
        raise UserError(
            f"CHECKPOINT: {adapter.folder} holds adapters of an LLM without tower and projector ({base}), and no {CONFIG} of a LLaVA; "
            "give adapters that a LLaVA was trained with, or put that training's config.json beside them"
        )
    plain = layout_of(of_base) == "llm"
    if plain and adapter.projector_files is None:
        raise UserError(
            f"CHECKPOINT: {adapter.folder} holds no projector, and its base {base} is an LLM alone; put the non_lora_trainables.bin of "
            "that training beside the adapters"
        )
    kind, layer = recipe(given, layout, folder)
    model = ModelConfig(llm=base, adapter=adapter.folder, projector_type=kind, select_layer=layer)  # pyright: ignore[reportCallIssue]
    return model, given, folder, layout


def recipe(given: Mapping[str, Any], layout: Layout, folder: Path) -> tuple[str, int]:
    """The type of projector and the tower's hidden state that the config.json of a whole LLaVA names. Raises UserError."""
    kind = given.get("mm_projector_type", "linear") if layout == "llava" else "mlp2x_gelu"
    layer = given.get("mm_vision_select_layer" if layout == "llava" else "vision_feature_layer", -2)
    if projector_name(str(kind)) is None:
        raise UserError(f"CHECKPOINT: {folder}/config.json has the projector {kind!r}; only {', '.join(PROJECTORS)} are supported")
    if not isinstance(layer, int):
        raise UserError(f"CHECKPOINT: {folder}/config.json selects the tower's layers {layer}; only one layer is supported")
    return str(kind), layer
