"""The projectors between tower and decoder, by name.

A new kind of projector takes three files: a module here with its `Kind`, its line in `KINDS` below, and its name with the pattern of
`model.projector_type` in the config's `PROJECTORS`.
"""

from collections.abc import Mapping

from fastllava.config import projector_name
from fastllava.errors import UserError
from fastllava.model.projectors.base import Kind, Projector
from fastllava.model.projectors.chain import IDENTITY, LINEAR, MLP
from fastllava.model.projectors.downsample import DOWNSAMPLE

KINDS: Mapping[str, Kind] = {"linear": LINEAR, "mlpNx_gelu": MLP, "identity": IDENTITY, "mlp_downsample": DOWNSAMPLE}
"""By the name in the config's `PROJECTORS`."""


def kind_of(projector_type: str) -> Kind:
    """The kind that `model.projector_type` names. Raises UserError when there is none."""
    name = projector_name(projector_type)
    if name is None:
        raise UserError(
            f"model.projector_type: {projector_type!r} is no projector; write one of {', '.join(KINDS)}; mlp2x_gelu is LLaVA-1.5's"
        )
    return KINDS[name]


__all__ = ["KINDS", "Kind", "Projector", "kind_of"]
