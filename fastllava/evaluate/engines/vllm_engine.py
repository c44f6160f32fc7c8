"""Answers by vLLM, over the checkpoint in llava-hf's layout: for many GPUs, or for more questions than a padded batch is good for.

vLLM gets the very token ids that the other engine embeds, and pictures of the size that the tower sees, padded or cut out already: its
own processor then has nothing to resize. It takes all GPUs of the machine, so torchrun is not for it.
Source of the interface: docs.vllm.ai, "Offline inference" and "Multimodal inputs".
"""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastllava.batch import IMAGE_ID
from fastllava.data.prepared import cache_root
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import Trained
from fastllava.evaluate.engines import Prompt, rows_of
from fastllava.export import export
from fastllava.model.weights.adapters import is_adapter_folder
from fastllava.model.weights.files import read_json
from fastllava.model.weights.layouts import layout_of
from fastllava.model.weights.write import not_in_hf

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class VllmEngine:
    """vLLM decides itself which prompts run together."""

    name = "vllm"
    window = 1024

    def __init__(self, trained: Trained, report: Callable[[str], object] = lambda line: None, pictures: int = 1) -> None:
        """`pictures`: the most that a prompt shows."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("--engine: vllm takes all GPUs of a machine by itself; start one process, without torchrun")
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            mend = "run pip install 'fastllava[vllm]', or write --engine transformers"
            raise UserError(f"--engine: vllm cannot be loaded ({error}); {mend}") from None
        self.trained = trained
        folder = hf_folder(trained, report)
        self._image_token = int(read_json(folder / "config.json", "CHECKPOINT")["image_token_index"])
        self._llm = self._vllm.LLM(
            model=str(folder),
            dtype=_DTYPES[trained.model.dtype],
            tensor_parallel_size=_gpus(trained.model.llm.config.num_attention_heads),
            limit_mm_per_prompt={"image": pictures},
            # What a generation_config.json says of sampling is not asked for.
            generation_config="vllm",
            seed=0,
        )

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """See `Engine.generate`."""
        stops = list(self.trained.stops)
        settings = self._vllm.SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=stops, detokenize=False)
        given = [self._prompt(prompt) for prompt in prompts]
        for index, output in enumerate(self._llm.generate(given, settings, use_tqdm=False) if given else []):
            answer = output.outputs[0]
            tokens = [token for token in answer.token_ids if token not in self.trained.stops]
            # Whether vLLM gives the token that ended it depends on its version.
            yield index, [*tokens, *(stops[:1] if answer.finish_reason == "stop" else [])]

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        """The prompt as vLLM takes it: one token where a picture stands, which it repeats for each patch."""
        if not prompt.pixels:
            return {"prompt_token_ids": prompt.ids}
        extra = len(prompt.pixels) * (self.trained.model.spec.patches - 1)
        ids = prompt.ids[: max(0, rows_of(prompt, self.trained) - extra)]
        if ids.count(IMAGE_ID) < len(prompt.pixels):
            raise UserError(f"--engine: vllm cannot cut a picture, and only {self.trained.max_tokens} tokens are read; take transformers")
        pictures = [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in prompt.pixels]
        ids = [self._image_token if token == IMAGE_ID else token for token in ids]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": pictures if len(pictures) > 1 else pictures[0]}}


def hf_folder(trained: Trained, report: Callable[[str], object]) -> Path:
    """The checkpoint's folder where it is in llava-hf's layout; else an export, kept in the cache under the weights' hash.

    Raises UserError where that layout cannot hold the model.
    """
    whole = (trained.folder / "config.json").is_file() and not is_adapter_folder(trained.folder)
    if whole and layout_of(read_json(trained.folder / "config.json", "CHECKPOINT")) == "hf":
        return trained.folder
    if (reason := not_in_hf(trained.model)) is not None:
        raise UserError(f"--engine: vllm reads Hugging Face's layout, which {reason}; write --engine transformers")
    folder = cache_root() / "exports" / trained.identity[:16]
    if not (folder / "config.json").is_file():
        report(f"vLLM reads llava-hf's layout: writing it to {folder}, once")
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(trained.folder, "hf", folder, report, base=trained.base)
    return folder


def _gpus(heads: int) -> int:
    """The most GPUs here that can share the attention's heads."""
    count = max(torch.cuda.device_count(), 1)
    return next(number for number in range(count, 0, -1) if heads % number == 0)
