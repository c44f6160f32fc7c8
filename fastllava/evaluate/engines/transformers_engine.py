"""Answers by transformers: its decoder and its `generate` with our weights, on batches padded on the left.

Shape letters: B prompts of a batch, L rows of the longest, D decoder width, I pictures, P patches a picture.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastllava.batch import IMAGE_ID
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import Trained
from fastllava.evaluate.engines import Prompt, rows_of
from fastllava.model import hf_reference


class TransformersEngine:
    """Prompts of about one length share a batch; which ones do changes an answer by no more than the order of additions."""

    name = "transformers"

    def __init__(self, trained: Trained, batch_size: int = 8, report: Callable[[str], object] = lambda line: None) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size: {batch_size} is no number of questions; write 1 or more")
        self.trained, self._batch_size, self._report = trained, batch_size, report
        self.window = 16 * batch_size
        model = trained.model
        self.decoder: Any = hf_reference.decoder(model, dict(model.named_parameters()).__getitem__, model.dtype).eval()
        self._embed: Tensor = model.llm.embedding_weight

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """See `Engine.generate`. When a batch is too large for the GPU's memory, batches are half as large from there on."""
        batches = self._batches(prompts)
        while batches:
            part = batches[0]
            try:
                answers = self._answers([prompts[i] for i in part], max_new_tokens)
            except torch.OutOfMemoryError:
                answers = None
            if answers is None:
                # Out here, where the error no longer holds what the batch had taken.
                self._halve()
                batches = [smaller for batch in batches for smaller in self._cut(batch)]
            else:
                yield from zip(part, answers, strict=True)
                del batches[0]

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Prompts of about one length together; the batch with the first of all prompts first, as an answers file waits for that."""
        by_length = sorted(range(len(prompts)), key=lambda i: (rows_of(prompts[i], self.trained), i))
        return sorted(self._cut(by_length), key=min)

    def _cut(self, numbers: list[int]) -> list[list[int]]:
        return [numbers[begin : begin + self._batch_size] for begin in range(0, len(numbers), self._batch_size)]

    def _halve(self) -> None:
        if self._batch_size == 1:
            raise UserError(
                "--batch-size: one question by itself does not fit into the GPU's memory; stop what else runs there, "
                "or write --precision bf16 or a smaller --max-new-tokens"
            )
        self._batch_size //= 2
        torch.cuda.empty_cache()
        self._report(f"the GPU's memory is full: going on with batches of {self._batch_size}")

    @torch.no_grad()
    def _answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        embeds_BLD, mask_BL = self.inputs(prompts)
        tokens_BN = self.decoder.generate(inputs_embeds=embeds_BLD, attention_mask=mask_BL, **self.settings(max_new_tokens))
        return [self._until_end(row) for row in tokens_BN.tolist()]

    def settings(self, max_new_tokens: int) -> dict[str, Any]:
        """What `generate` is told: the most likely token at every step, and nothing that a generation_config.json says besides."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=list(self.trained.stops),
            # Any will do: what comes after an end is cut off.
            pad_token_id=self.trained.stops[0] if self.trained.stops else 0,
        )
        # generate fills what is left open from the module's own.
        self.decoder.generation_config = config
        return {"generation_config": config}

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = (at for at, token in enumerate(tokens) if token in self.trained.stops)
        return tokens[: next(ends, len(tokens)) + 1]

    @torch.no_grad()
    def inputs(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] in the model's dtype, and int64 [B, L], 0 in the rows of zeros that stand before the shorter prompts."""
        pictures = {id(pixels): pixels for prompt in prompts for pixels in prompt.pixels}
        features = dict(zip(pictures, self._features(list(pictures.values())), strict=True)) if pictures else {}
        rows = [self._spliced(prompt, [features[id(pixels)] for pixels in prompt.pixels]) for prompt in prompts]
        longest = max(map(len, rows))
        embeds_BLD = torch.zeros(len(rows), longest, self._embed.shape[1], dtype=self.trained.model.dtype, device=self._embed.device)
        mask_BL = torch.zeros(len(rows), longest, dtype=torch.int64, device=self._embed.device)
        for number, its in enumerate(rows):
            embeds_BLD[number, longest - len(its) :] = its
            mask_BL[number, longest - len(its) :] = 1
        return embeds_BLD, mask_BL

    def _features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """[I, P, D]."""
        model = self.trained.model
        pixels = torch.from_numpy(np.stack(pictures)).to(self._embed.device)
        return model.projector(model.features(pixels)).unflatten(0, (len(pictures), -1))

    def _spliced(self, prompt: Prompt, features: Sequence[Tensor]) -> Tensor:
        """[rows, D]: text and pictures, whose `features` are [P, D] each, in their order, cut as `rows_of` says."""
        ids = torch.tensor(prompt.ids, device=self._embed.device)
        marks = (ids == IMAGE_ID).nonzero().flatten().tolist()
        if len(marks) != len(features):
            raise ValueError(f"a prompt that shows {len(marks)} pictures comes with the pixels of {len(features)}")
        pieces, begin = [], 0
        for at, feature_PD in zip(marks, features, strict=True):
            pieces += [torch.nn.functional.embedding(ids[begin:at], self._embed), feature_PD]
            begin = at + 1
        pieces.append(torch.nn.functional.embedding(ids[begin:], self._embed))
        return torch.cat(pieces)[: rows_of(prompt, self.trained)].to(self.trained.model.dtype)
