"""From a model to files: the projector alone, or a whole checkpoint in the original's layout or in llava-hf's.

Everything is written beside its place, synced, and renamed (`beside`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastllava.config import ModelConfig
from fastllava.errors import UserError
from fastllava.model.llava import Llava
from fastllava.model.mpt import Mpt
from fastllava.model.projectors import KINDS, Projector, kind_of
from fastllava.model.weights.beside import beside_its_place, names_below, on_cpu
from fastllava.model.weights.config_files import Vocabulary, config_files, tower_config, tower_preprocessor, vocabulary_of
from fastllava.model.weights.files import dump_json
from fastllava.model.weights.fill import TABLES
from fastllava.model.weights.layouts import to_disk
from fastllava.model.weights.tokenizer_files import WrittenTokenizer, find_tokenizer, write_hf, write_original

TEMPLATE_KEY = "fastllava_template"
"""Says in the original's config.json, which has no word for it, what template the model was trained with."""
SHARD_BYTES = 5 * 10**9
"""A checkpoint's files are cut here, as transformers cuts them."""


def write_projector(
    projector: Projector,
    folder: Path,
    dtype: torch.dtype,
    state: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[str]:
    """`mm_projector.safetensors` and `.bin` in `folder`: the original's keys (`model.mm_projector.0.weight`, ...) in `dtype`.

    `state` stands for the projector's own state where that is sharded; `config` is written as config.json beside it, for the
    original's loader. The names of the files. Raises OSError.
    """
    state = projector.state_dict() if state is None else state
    tensors = {to_disk(f"projector.{name}", "llava"): on_cpu(tensor, dtype) for name, tensor in state.items()}
    with beside_its_place(folder, 2 * sum(tensor.nbytes for tensor in tensors.values())) as beside:
        save_file(tensors, beside / "mm_projector.safetensors", metadata={"format": "pt"})
        torch.save(tensors, beside / "mm_projector.bin")
        if config is not None:
            dump_json(config, beside / "config.json")
        return names_below(beside)


def write_checkpoint(
    model: Llava,
    layout: str,
    folder: Path,
    dtype: torch.dtype,
    *,
    source: ModelConfig,
    image_policy: str,
    max_tokens: int,
    chat_template: str | None = None,
    template: str | None = None,
    legacy: bool | None = None,
    report: Callable[[str], object] = lambda line: None,
    state: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """The whole model in `folder`, which may hold other files: weights in `dtype`, configs, tokenizer.

    layout: "llava" (the original's; the tower is in it) or "hf" (llava-hf's, for LlavaForConditionalGeneration, with
    processor files, and `chat_template` in Jinja where there is one). `source` says where the tokenizer is; image_policy and
    max_tokens are those of training, and so is template, which layout llava notes where it is given; legacy is the tokenizer's (None: as
    its config says). `report` gets a line for whatever was left out
    or changed. `state` stands for the model's own state where that is sharded.
    The names of the files, below `folder`. Raises OSError, and UserError before any weight is written when the layout cannot
    hold this model.
    """
    projector_type = model.projector.projector_type
    if layout == "hf" and (reason := not_in_hf(model)) is not None:
        raise UserError(f"--layout: hf {reason}; write --layout llava")
    if layout == "llava" and not kind_of(projector_type).original:
        report(f"config.json: mm_projector_type {projector_type} is none that the original's code builds; fastllava reads it")
    if layout == "llava" and not model.tower.config.CLASS_ROWS:
        report(f"config.json: the original's code builds CLIP towers only, and this one is {model.tower.config.NAME}; fastllava reads it")
    values = model.state_dict() if state is None else state
    with beside_its_place(folder, dtype.itemsize * sum(tensor.numel() for tensor in values.values())) as beside:
        tokenizer = _write_tokenizer(model, layout, beside, source, max_tokens, legacy, report)
        if layout == "hf" and chat_template is not None:
            (beside / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        vocabulary = vocabulary_of(model, layout, tokenizer)
        _write_tensors(disk_tensors(model, layout, dtype, vocabulary, state), beside)
        files = config_files(
            model,
            layout,
            dtype,
            source=source,
            vocabulary=vocabulary,
            image_policy=image_policy,
            max_tokens=max_tokens,
            tokenizer=tokenizer,
            home=folder,
            report=report,
        )
        if layout == "llava" and template is not None:
            files["config.json"] = {**files["config.json"], TEMPLATE_KEY: template}
        for name, value in files.items():
            dump_json(value, beside / name)
        if layout == "llava" and source.vision_tower is None and model.origin.tower_folder is None:
            _write_tower(model, beside / "vision_tower", dtype)
        return names_below(beside)


def not_in_hf(model: Llava) -> str | None:
    """Why llava-hf's layout cannot hold this model, in words that follow its name; None where it can."""
    projector_type = model.projector.projector_type
    if projector_type not in kind_of(projector_type).hf:
        held = ", ".join(name for kind in KINDS.values() for name in kind.hf)
        return f"holds {held} projectors only, this one is {projector_type}"
    if isinstance(model.llm, Mpt):
        return "holds no MPT, as transformers 5.24 builds no LlavaForConditionalGeneration of one"
    return None


def disk_tensors(
    model: Llava, layout: str, dtype: torch.dtype, vocabulary: Vocabulary, state: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor on the CPU in `dtype`) of everything in the checkpoint, one at a time."""
    for name, tensor in (model.state_dict() if state is None else state).items():
        yield to_disk(name, layout, model.llm.HOME), on_cpu(vocabulary.fit(tensor) if name in TABLES else tensor, dtype)


def _write_tokenizer(
    model: Llava,
    layout: str,
    folder: Path,
    source: ModelConfig,
    max_tokens: int,
    legacy: bool | None,
    report: Callable[[str], object],
) -> WrittenTokenizer | None:
    found = find_tokenizer(source, legacy)
    if found is None and layout == "hf":
        place = source.tokenizer or source.llm
        raise UserError(
            f"model.tokenizer: no tokenizer.model or tokenizer.json in {place}, and --layout hf writes a processor; put one there"
        )
    if found is None:
        report(f"tokenizer: none written, as {source.tokenizer or source.llm} holds none")
        return None
    if found.names_code:
        report("tokenizer_config.json: left out auto_map, as code of a checkpoint's own is not passed on")
    if layout == "llava":
        write_original(found, folder, max_tokens)
        return None
    return write_hf(found, folder, model.origin.image_token, max_tokens)


def _write_tower(model: Llava, folder: Path, dtype: torch.dtype) -> None:
    """The tower as a folder of its own: the original's loader wants one besides the weights in the checkpoint."""
    folder.mkdir()
    save_file({name: on_cpu(tensor, dtype) for name, tensor in model.tower.state_dict().items()}, folder / "model.safetensors")
    dump_json(tower_config(model), folder / "config.json")
    dump_json(tower_preprocessor(model.spec), folder / "preprocessor_config.json")


def _write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = 0
    for name, tensor in tensors:
        if waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > SHARD_BYTES:
            shards.append(_write_shard(waiting, folder / f"{len(shards)}.shard"))
        waiting[name] = tensor
        total += tensor.nbytes
    shards.append(_write_shard(waiting, folder / f"{len(shards)}.shard"))
    if len(shards) == 1:
        (folder / "0.shard").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.shard").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    dump_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / "model.safetensors.index.json")


def _write_shard(tensors: dict[str, Tensor], file: Path) -> list[str]:
    """Write and forget `tensors`; their names."""
    save_file(tensors, file, metadata={"format": "pt"})
    names = list(tensors)
    tensors.clear()
    return names
