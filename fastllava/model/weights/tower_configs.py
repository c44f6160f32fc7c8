"""What a tower's config.json and preprocessor config say, in our terms. Refuses what is not supported."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastllava.batch import ImageSpec
from fastllava.errors import UserError
from fastllava.model.fields import positive
from fastllava.model.towers import TOWERS, TowerConfig
from fastllava.model.weights.files import read_optional_json

RESAMPLE = {"bilinear": 2, "bicubic": 3}
"""Pillow's number, which a preprocessor config has, of each way to resize."""
_WHOLE = {kind.WHOLE: kind for kind in TOWERS.values()}


def vision_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vision part of the config.json of a whole CLIP or SigLIP; any other config as it is."""
    kind = _WHOLE.get(str(config.get("model_type")))
    if kind is None:
        return config
    return {**(config.get("vision_config") or config.get("vision_config_dict") or {}), "model_type": kind.MODEL_TYPE}


def tower_config(config: Mapping[str, Any], where: str) -> TowerConfig:
    """The tower that `config` describes: a vision model, or the vision part of a whole one. `where` begins every error."""
    config = vision_part(config)
    model_type = config.get("model_type")
    kind = TOWERS.get(str(model_type))
    naflex = f"model_type {model_type!r}" if str(model_type).startswith("siglip2") else None
    if naflex is None and config.get("num_patches") and config.get("image_size") is None:
        # Where the size is fixed there is an image_size.
        naflex = f"num_patches {config['num_patches']} without an image_size"
    if naflex:
        raise UserError(
            f"{where}: {naflex} is a SigLIP2 of any aspect (NaFlex), whose images differ in their number of patches; that is not "
            "supported: give a SigLIP2 of a fixed size, such as google/siglip2-so400m-patch14-384, whose model_type is siglip"
        )
    if kind is None:
        raise UserError(
            f"{where}: model_type {model_type!r} is no CLIP or SigLIP vision model; give one of type {', '.join((*_WHOLE, *TOWERS))}"
        )
    found = kind(**{field.name: config[field.name] for field in fields(kind) if config.get(field.name) is not None})
    for field in fields(kind):
        if field.type is not str:
            positive({field.name: getattr(found, field.name)}, field.name, where, field.type)  # pyright: ignore[reportArgumentType]
    if found.num_channels != 3:
        raise UserError(f"{where}: num_channels {found.num_channels} is not supported; images are RGB")
    if config.get("attention_dropout"):
        raise UserError(f"{where}: attention_dropout {config['attention_dropout']} is not supported; write 0.0")
    if found.hidden_size % found.num_attention_heads:
        raise UserError(f"{where}: num_attention_heads {found.num_attention_heads} does not divide hidden_size {found.hidden_size}")
    if not found.patches:
        raise UserError(f"{where}: patch_size {found.patch_size} is larger than image_size {found.image_size}; an image needs a patch")
    return found


def read_preprocessor(folder: Path, key: str) -> dict[str, Any]:
    """The image processor's fields in `folder`, from preprocessor_config.json or processor_config.json; empty when it has neither."""
    found = read_optional_json(folder / "preprocessor_config.json", key)
    return found or read_optional_json(folder / "processor_config.json", key).get("image_processor") or {}


def image_spec(config: TowerConfig, preprocessor: Mapping[str, Any], where: str) -> ImageSpec:
    """What the tower wants to see, with a token for each patch; as published for its kind where the preprocessor is silent."""
    crops = preprocessor.get("do_center_crop")
    crops = config.CROPS if crops is None else bool(crops)
    # What is cut out decides where something is; what the image is resized to decides where nothing is.
    key = "crop_size" if crops else "size"
    given = preprocessor.get(key)
    sides = set(given.values()) if isinstance(given, Mapping) else {given}
    if not sides <= {None, config.image_size} or (not crops and isinstance(given, Mapping) and "shortest_edge" in given):
        raise UserError(f"{where}: {key} {given} of the preprocessor is not the tower's image_size {config.image_size}; make them equal")
    rescale = preprocessor.get("rescale_factor", 1 / 255)
    if not isinstance(rescale, (int, float)) or abs(rescale - 1 / 255) > 1e-9 or preprocessor.get("do_normalize") is False:
        raise UserError(f"{where}: the preprocessor does not scale pixels by 1/255 and normalise them; give {config.NAME}'s own")
    resample = preprocessor.get("resample")
    ways = {None: "bicubic", **{number: way for way, number in RESAMPLE.items()}}
    if resample not in ways:
        raise UserError(f"{where}: resample {resample!r} of the preprocessor is not supported; write 3 (bicubic) or 2 (bilinear)")
    mean = tuple(preprocessor.get("image_mean") or config.MEAN)
    std = tuple(preprocessor.get("image_std") or config.STD)
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"{where}: image_mean and image_std of the preprocessor need three numbers each")
    return ImageSpec(config.image_size, config.patches, mean, std, crops, ways[resample])  # pyright: ignore[reportArgumentType]
