"""adapter_config.json, as PEFT 0.4 to 0.21 write it: what it says of the adapters, and what it asks for that is not computed here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllava.errors import UserError
from fastllava.model.weights.files import read_json

ADAPTER_CONFIG = "adapter_config.json"

_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"}
# Of where adapters lie the tensors tell, and of what else was trained. The rest is how a training began, or of one method that
# another field turns on; fan_in_fan_out PEFT itself ignores for linear layers.
_NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dtype",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
_SOME_LAYERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is; the others take from its weights what they put into the adapters."""
_WORDS = {
    "use_dora": "DoRA scales each row of the weights",
    "layer_replication": "it copies layers of the base",
    "lora_bias": "its adapters have biases",
    "trainable_token_indices": "it trains rows of the embedding",
    "target_parameters": "it adapts parameters that are no linear layer",
}
"""What a field stands for, where its name does not say it."""
_NESTED = re.compile(r"\)[*+{?]|(?:[*+{?].*){3}")
_LONGEST, _MOST = 300, 500
"""Keys of rank_pattern and alpha_pattern that are matched: others could take for ever."""


@dataclass(frozen=True)
class Said:
    """What adapter_config.json says of the adapters beside it."""

    file: Path
    key: str
    merge: str
    """The remedy for what only PEFT computes."""
    rank: int | None
    alpha: float
    root: bool
    """Whether alpha is divided by the root of the rank."""
    dropout: float
    base: str | None
    ranks: Mapping[str, float] = field(default_factory=dict)
    """Ranks of layers whose names end in what matches, where they differ."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    everywhere: frozenset[str] = frozenset()
    """Names of layers that target_modules lists, where nothing else says that some of them have no adapter."""

    def of(self, module: str, pattern: Mapping[str, float], otherwise: float | None) -> float | None:
        """What `pattern` gives to a layer, as PEFT finds it: by the first key that its name, or the end of it, matches."""
        for key, value in pattern.items():
            try:
                if len(key) > _LONGEST or _NESTED.search(key) or len(pattern) > _MOST:
                    raise ValueError("to match it could take for ever")
                if re.fullmatch(rf"(.*\.)?({key})", module):
                    return value
            except (re.error, ValueError) as error:
                raise self.error(f"rank_pattern or alpha_pattern has the key {key[:80]!r}, which is not matched ({error})") from None
        return otherwise

    def error(self, what: str) -> UserError:
        """The error that something is not computed."""
        return UserError(f"{self.key}: {self.file}: {what}; {self.merge}")


def read_adapter_config(folder: Path, key: str) -> Said:
    """What adapter_config.json in `folder` says. Raises UserError, which `key` begins, for what is not computed here."""
    file = folder / ADAPTER_CONFIG
    given = read_json(file, key)
    place = " as model.llm" if key.startswith("model.") else ""
    merge = f"merge it into its base with PEFT (merge_and_unload, save_pretrained) and give the merged folder{place}"
    base, rank, targets = given.get("base_model_name_or_path"), given.get("r"), given.get("target_modules")
    said = Said(
        file,
        key,
        merge,
        rank if isinstance(rank, int) else None,
        given.get("lora_alpha", 8),
        bool(given.get("use_rslora")),
        given.get("lora_dropout") or 0.0,
        base if isinstance(base, str) and base else None,
        given.get("rank_pattern") or {},
        given.get("alpha_pattern") or {},
        frozenset(filter(_is_text, targets))
        if isinstance(targets, list) and all(given.get(name) in (None, []) for name in _SOME_LAYERS)
        else frozenset(),
    )
    if str(given.get("peft_type")).upper() != "LORA":
        raise said.error(f"peft_type is {given.get('peft_type')!r}, and only LORA is computed")
    for name, value, good in (
        ("r", rank, rank is None or (_number(rank, 1) and isinstance(rank, int))),
        ("lora_alpha", said.alpha, _number(said.alpha, 0)),
        ("lora_dropout", said.dropout, _number(said.dropout, 0) and said.dropout < 1),
        *((key, getattr(said, it), _numbers(getattr(said, it))) for key, it in (("rank_pattern", "ranks"), ("alpha_pattern", "alphas"))),
    ):
        if not good:
            raise UserError(f"{key}: {file}: {name} is {str(value)[:80]!r}, which PEFT never writes; fetch the folder again")
    if given.get("bias", "none") not in ("none", None):
        raise said.error(f"bias is {given['bias']!r}: its biases were trained, and only 'none' is computed")
    if given.get("init_lora_weights", True) not in _KEEPS_THE_BASE:
        raise said.error(f"init_lora_weights is {str(given['init_lora_weights'])[:40]!r}, which changes the base before it trains")
    for name, value in given.items():
        if name not in _READ | _NO_MATTER and value not in (None, False, "", [], {}):
            words = f" ({_WORDS[name]})" if name in _WORDS else ""
            raise said.error(f"{name[:60]} is {str(value)[:80]}{words}, which is not computed here")
    return said


def _number(value: Any, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= 2**53


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and _number(v, 0) for k, v in value.items())
