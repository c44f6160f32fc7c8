"""The kinds of vision towers, behind one interface: a kind is a `TowerConfig` in a file of its own, and `Tower` computes all of them."""

from collections.abc import Mapping

from fastllava.model.towers.clip import ClipConfig
from fastllava.model.towers.siglip import SiglipConfig
from fastllava.model.towers.vit import Tower, TowerConfig

TOWERS: Mapping[str, type[TowerConfig]] = {kind.MODEL_TYPE: kind for kind in (ClipConfig, SiglipConfig)}
"""By the model_type of a tower's config.json."""

__all__ = ["TOWERS", "ClipConfig", "SiglipConfig", "Tower", "TowerConfig"]
