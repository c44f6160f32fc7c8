"""Folders of LoRA adapters: PEFT's of every version, the original's and those trained on llava-hf, read by our names.

| tensor | ours | on disk, where `base_model.model.` may stand before and `.default` before the last word |
|---|---|---|
| A [r, in] | llm.model.layers.N.self_attn.q_proj.lora_A.weight | model.layers..., model.language_model.layers... or the older |
| B [out, r] | llm.model.layers.N.self_attn.q_proj.lora_B.weight | language_model.model.layers... |
| projector | projector... | in non_lora_trainables.bin model.mm_projector..., by modules_to_save model.multi_modal_projector... |

What a folder asks for beyond B A on linear layers of the decoder is refused, in one line that names it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastllava.config import TARGETS, LoraConfig, Target
from fastllava.errors import UserError
from fastllava.model.weights.adapter_config import ADAPTER_CONFIG, Said, read_adapter_config
from fastllava.model.weights.files import TensorFiles
from fastllava.model.weights.layouts import to_ours
from fastllava.model.weights.merging import LowRank

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILES = ("non_lora_trainables.bin", "non_lora_trainables.safetensors", "mm_projector.safetensors", "mm_projector.bin")
"""Where the projector lies that was trained beside the adapters, when not among them."""

_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.|^(?:module\.)+")
_PEFT = re.compile(r"^(?:base_model\.model\.)+")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_PART = re.compile(r"(?P<module>.+)\.(?P<kind>lora_\w+?)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?")
_OURS = re.compile(rf"llm\.model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<target>{'|'.join(TARGETS)})\.lora_[AB]\.weight")
_PLACES = {
    "tower.": "the vision tower",
    "projector.": "the projector",
    "llm.model.embed_tokens.": "the embedding",
    "llm.lm_head.": "the head",
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds; its tensors stay in the files until they are asked for."""

    folder: Path
    rank: int
    alpha: float
    """What B A is multiplied by is alpha / rank, also where the folder divides by the root of the rank (rsLoRA)."""
    dropout: float
    targets: tuple[Target, ...]
    """The linear layers that have an adapter, in the order of `TARGETS`."""
    layers: frozenset[tuple[int, str]]
    """Number of the decoder layer and linear layer of every adapter."""
    base: str | None
    """base_model_name_or_path: what it was trained on, as its writer named it."""
    files: TensorFiles
    names: Mapping[str, str]
    """Our name of each A and B by its name in `files`."""
    projector_files: TensorFiles | None
    """Where the projector lies; None where the folder holds none."""
    projector_names: Mapping[str, str]
    """Our name of each of its tensors by its name there."""
    asked: tuple[Target, ...] = ()
    """The linear layers that adapter_config.json asks an adapter for on every decoder layer, as far as it names them so."""

    @property
    def where(self) -> str:
        """The key that gave it and its folder, as errors begin."""
        return f"{self.files.key}: {self.folder}"

    @property
    def lora(self) -> LoraConfig:
        """What a training that goes on from it has as `lora`."""
        return LoraConfig(rank=self.rank, alpha=float(self.alpha), dropout=self.dropout, targets=list(self.targets))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def tensors(self) -> dict[str, Tensor]:
        """Every A and B by our name; they lie in the mapped file."""
        return {self.names[name]: tensor for name, tensor in self.files.stream() if name in self.names}

    def projector(self) -> dict[str, Tensor]:
        """The projector by our names, empty where there is none; it lies in the mapped file."""
        found = self.projector_files.stream() if self.projector_files else ()
        return {self.projector_names[name]: tensor for name, tensor in found if name in self.projector_names}

    def to_be_added(self, layers: int) -> LowRank:
        """What merging it adds to the weights of a decoder of so many layers. Raises UserError when one is missing that it asks for."""
        if (lacking := self._lacking(layers, self.asked)) is not None:
            raise UserError(f"{self.where} holds no adapter on {lacking}, and its {ADAPTER_CONFIG} asks for one; fetch the folder again")
        return LowRank(self.scale, self.tensors(), self.where)

    def to_go_on_from(self, lora: LoraConfig, layers: int) -> dict[str, Tensor]:
        """`tensors`, for a training with the adapters of `lora` on a decoder of so many layers. Raises UserError when they are others."""
        alpha = lora.scale * (lora.rank or 0)
        mine = self.lora
        for name, wanted, found in (
            ("rank", lora.rank, mine.rank),
            ("alpha", alpha, alpha if math.isclose(alpha, self.alpha, rel_tol=1e-12) else self.alpha),
            ("targets", [target for target in TARGETS if target in lora.targets], mine.targets),
        ):
            if wanted != found:
                written = f"[{','.join(found)}]" if isinstance(found, list) else f"{found:.17g}"
                given = f"[{','.join(wanted)}]" if isinstance(wanted, list) else f"{wanted:.17g}"
                raise UserError(
                    f"lora.{name}: {given}, and the adapters of model.adapter {self.folder} have {written}; write lora.{name}={written}"
                )
        if (lacking := self._lacking(layers, self.targets)) is not None:
            remedy = "give adapters that lie on every layer, or leave lora.rank out, which merges these"
            raise UserError(f"{self.where} holds no adapter on {lacking}, and a training has one; {remedy}")
        return self.tensors()

    def _lacking(self, layers: int, targets: Sequence[str]) -> str | None:
        """The first adapter that a decoder of so many layers has by `targets` and that is not here; None when all are."""
        wanted = ((layer, target) for layer in range(layers) for target in targets)
        return next((f"layers.{layer} {target}" for layer, target in wanted if (layer, target) not in self.layers), None)


def is_adapter_folder(folder: Path) -> bool:
    """Whether `folder` holds adapters and no whole model, whether or not a config.json lies beside them."""
    whole = any(folder.glob("*model*.safetensors*")) and not (folder / ADAPTER_WEIGHTS[0]).is_file()
    return (folder / ADAPTER_CONFIG).is_file() and not whole and not any(folder.glob("pytorch_model*.bin*"))


def adapter_file(folder: Path) -> Path | None:
    """The file of the adapters in `folder`, safetensors before .bin."""
    return next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)


def read_adapter(folder: Path, key: str) -> Adapter:
    """What the adapters in `folder` are. `key`, a config key or option, begins every error.

    Raises UserError when it is no such folder, when a file cannot be read, when the tensors are not what adapter_config.json
    says, and for everything that is not computed here.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is no folder; give the folder of a LoRA adapter, which holds {ADAPTER_CONFIG}")
    said = read_adapter_config(folder, key)
    file = adapter_file(folder)
    if file is None:
        raise UserError(f"{key}: {folder} holds {ADAPTER_CONFIG} and none of {', '.join(ADAPTER_WEIGHTS)}; fetch the folder again")
    files = TensorFiles(file, key)
    names, saved = _sorted_out(files, said)
    modules = _checked(files, names, said)
    rank, alpha = _one_rank_and_alpha(files, modules, said)
    projector = files if saved else _projector_files(folder, key)
    if projector is not None and not saved:
        saved = {name: _projector_name(name) for name in projector.names}
        if other := next((name for name, ours in saved.items() if ours is None), None):
            raise UserError(
                f"{key}: {projector.path} holds {other[:120]}, and only a projector's tensors are read beside adapters; {said.merge}"
            )
    layers = frozenset(_place(ours) for ours in names.values())
    found = {target for _, target in layers}
    return Adapter(
        folder=folder,
        rank=rank,
        alpha=alpha,
        dropout=said.dropout,
        targets=tuple(target for target in TARGETS if target in found),
        layers=layers,
        base=said.base,
        files=files,
        names=names,
        projector_files=projector,
        projector_names={name: ours for name, ours in saved.items() if ours is not None},
        asked=tuple(target for target in TARGETS if target in said.everywhere),
    )


def _place(ours: str) -> tuple[int, str]:
    """Layer and target of the name of an A or a B."""
    match = _OURS.fullmatch(ours)
    if match is None:
        raise ValueError(f"{ours} is no adapter's name")
    return int(match["layer"]), match["target"]


def _plain(name: str) -> str:
    """A name without what PEFT and wrappers put before it."""
    return _PEFT.sub("", _WRAPPERS.sub("", name))


def _projector_name(name: str) -> str | None:
    return to_ours(_SAVED.sub("", _plain(name)), "projector")


def _sorted_out(files: TensorFiles, said: Said) -> tuple[dict[str, str], dict[str, str | None]]:
    """By names on disk, our names of every A and B, and of the projector. Raises UserError for any other tensor."""
    names: dict[str, str] = {}
    saved: dict[str, str | None] = {}
    adapters: set[str] = set()
    for name in files.names:
        plain = _plain(name)
        if ".original_module." in plain:
            # The base's own, in a dump of the live model.
            continue
        part = _PART.fullmatch(plain)
        if part is None:
            saved[name] = _projector_name(name)
            if saved[name] is None:
                raise files_error(files, f"holds {name[:120]}, which is neither an adapter nor a projector", said)
            continue
        adapters.add(part["adapter"] or "default")
        if part["kind"] not in ("lora_A", "lora_B") or part["leaf"] != "weight":
            raise files_error(files, f"holds {name[:120]}, and only lora_A and lora_B of linear layers are computed", said)
        inner = f"{part['module']}.{part['kind']}.weight"
        ours = to_ours(inner, "hf") or to_ours(inner, "llava")
        if ours is None or _OURS.fullmatch(ours) is None:
            place = next(
                (place for start, place in _PLACES.items() if str(ours).startswith(start)), "no linear layer of a Llama-like decoder"
            )
            raise files_error(files, f"adapts {place} ({name[:120]}), and only {', '.join(TARGETS)} of the decoder are computed", said)
        names[name] = ours
    if len(adapters) > 1:
        raise files_error(files, f"holds the adapters {', '.join(sorted(adapters))[:200]}, and one is read", said)
    return names, saved


def _checked(files: TensorFiles, names: Mapping[str, str], said: Said) -> dict[str, tuple[str, int]]:
    """Name on disk and rank by our name of each adapted layer. Raises UserError when an A is without its B, or shapes do not fit."""
    if not names:
        raise files_error(files, "holds no lora_A and no lora_B", said, "fetch the folder again")
    if len(set(names.values())) < len(names):
        raise files_error(files, "holds a tensor under two names", said, "keep one of them")
    shapes = {names[name]: (name, tensor) for name, tensor in files.stream() if name in names}
    modules: dict[str, tuple[str, int]] = {}
    for ours, (name, a) in shapes.items():
        module, _, rest = ours.rpartition(".lora_")
        other = f"{module}.lora_{'B' if rest.startswith('A') else 'A'}.weight"
        if other not in shapes:
            raise files_error(files, f"holds {name[:120]} without the other of lora_A and lora_B", said, "fetch the folder again")
        if not a.is_floating_point():
            raise files_error(
                files, f"has {name[:120]} in {str(a.dtype).removeprefix('torch.')}, where floats are needed", said, "fetch it again"
            )
        if rest.startswith("A"):
            b = shapes[other][1]
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
                what = f"has {name[:120]} {list(a.shape)} with B {list(b.shape)}, where [rank, in] and [out, rank] are needed"
                raise files_error(files, what, said, "write it again from a whole model: a sharded one saves empty tensors")
            modules[module] = (name, a.shape[0])
    return modules


def _one_rank_and_alpha(files: TensorFiles, modules: Mapping[str, tuple[str, int]], said: Said) -> tuple[int, float]:
    """The rank and alpha that all adapters share. Raises UserError when they differ, or are not what adapter_config.json says."""
    alphas: dict[float, str] = {}
    ranks: dict[int, str] = {}
    for name, rank in modules.values():
        module = _plain(name).rpartition(".lora_A")[0]
        wanted = said.of(module, said.ranks, said.rank)
        if wanted is not None and wanted != rank:
            what = f"has {name[:120]} of rank {rank}, and {ADAPTER_CONFIG} says {wanted:g}"
            raise files_error(files, what, said, "fetch both files of one training")
        alpha = said.of(module, said.alphas, said.alpha) or 0.0
        ranks.setdefault(rank, module)
        alphas.setdefault(alpha * math.sqrt(rank) if said.root else alpha, module)
    for what, found in (("rank", ranks), ("alpha", alphas)):
        if len(found) > 1:
            (one, first), (two, second) = list(found.items())[:2]
            key = f"{what}_pattern"
            raise said.error(f"{key}: gives {first} {what} {one:g} and {second} {two:g}, and one {what} for all is computed")
    return next(iter(ranks)), next(iter(alphas))


def _projector_files(folder: Path, key: str) -> TensorFiles | None:
    found = next((folder / name for name in PROJECTOR_FILES if (folder / name).is_file()), None)
    return None if found is None else TensorFiles(found, key)


def files_error(files: TensorFiles, what: str, said: Said, remedy: str | None = None) -> UserError:
    """The error of a file of adapters, with `said`'s remedy where there is no other."""
    return UserError(f"{files.key}: {files.path} {what}; {remedy or said.merge}")
