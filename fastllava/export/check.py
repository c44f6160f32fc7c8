"""The check of a written checkpoint: every tensor bit for bit, logits of a fixed image and prompt, and transformers' view of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastllava.batch import IMAGE_ID
from fastllava.config import ModelConfig
from fastllava.data.loader import Sample, pack
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError
from fastllava.model.llava import Llava, normalise
from fastllava.model.ops import reference_ops
from fastllava.model.weights import disk_tensors, load_llava
from fastllava.model.weights.config_files import Vocabulary
from fastllava.model.weights.files import TensorFiles, read_json
from fastllava.model.weights.tokenizer_files import find_tokenizer

PROMPT = "USER: <image>\nWhat is shown in the image? ASSISTANT:"
# How far transformers' logits may be from ours, as a share of their norm: a few roundings of the dtype, layer upon layer.
# A tensor in the wrong place moves them by a share near 1.
_BOUND = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

Report = Callable[[str], object]


class Check:
    """Asks `model` the fixed question before it is written; `run` asks what was written the same.

    `source` is where the model was read from. Raises UserError when the tokenizer there has ids that the model has not.
    """

    def __init__(self, model: Llava, layout: str, dtype: torch.dtype, source: ModelConfig, legacy: bool | None) -> None:
        self._model, self._layout, self._dtype, self._source = model, layout, dtype, source
        self._ids, readable = _prompt_ids(source, legacy), [3, 5, IMAGE_ID, 7, 11]
        vocab, spec = model.llm.config.vocab_size, model.spec
        over = [i for i in self._ids or [] if i >= vocab]
        if over:
            raise UserError(f"model.tokenizer: it gives the id {over[0]}, and {source.llm} has {vocab} tokens; give that model's own")
        ids = self._ids or [i if i < 0 else i % vocab for i in readable]
        row = np.arange(spec.size)
        image = np.stack([(row[:, None] * 5 + row * 3 + 85 * channel) % 256 for channel in range(3)]).astype(np.uint8)
        sample = Sample(np.array(ids, np.int32), np.zeros((0, 2), np.int32), [image], 1.0)
        self._batch = pack([sample], spec, len(ids) + spec.patches)
        with torch.no_grad():
            self._logits = model.logits(self._batch)

    def run(self, out: Path, report: Report) -> None:
        """Compare what lies in `out`; `report` gets a line for each check that holds. Raises UserError on the first that does not."""
        rows = read_json(out / "config.json", "--out")
        rows = rows.get("text_config", rows)["vocab_size"]
        vocabulary = Vocabulary(min(rows, self._model.llm.config.vocab_size), rows)
        self._tensors(out, vocabulary, report)
        self._reloaded(out, vocabulary, report)
        if self._layout == "hf":
            self._transformers(out, vocabulary, report)

    def _tensors(self, out: Path, vocabulary: Vocabulary, report: Report) -> None:
        found = dict(TensorFiles(out, "--out").stream())
        count = len(found)
        for name, tensor in disk_tensors(self._model, self._layout, self._dtype, vocabulary):
            if name not in found or not _same_bits(found.pop(name), tensor):
                raise _failed(f"tensor {name} was not read back as it was written")
        if found:
            raise _failed(f"tensor {next(iter(found))} was read back and never written")
        report(f"check: all {count} tensors read back bit for bit")

    def _reloaded(self, out: Path, vocabulary: Vocabulary, report: Report) -> None:
        tower = self._source.vision_tower or self._model.origin.tower_folder
        again = self._source.model_copy(update={"llm": out, "vision_tower": tower, "projector": None, "tokenizer": None})
        reloaded = load_llava(again, reference_ops(), self._dtype, seed=0)
        with torch.no_grad():
            logits = reloaded.logits(self._batch)[:, : vocabulary.kept]
        if not torch.equal(logits, self._logits[:, : vocabulary.kept]):
            raise _failed("logits of the fixed image and prompt differ after reading it back")
        report("check: logits of a fixed image and prompt are equal after reading it back")

    def _transformers(self, out: Path, vocabulary: Vocabulary, report: Report) -> None:
        try:
            import transformers
        except ImportError:
            report("check with transformers: left out, as it is not installed")
            return
        name = f"transformers {transformers.__version__}"
        with _quiet(transformers.utils.logging):
            loaded: Any = transformers.LlavaForConditionalGeneration.from_pretrained(out, torch_dtype=self._dtype, output_loading_info=True)
            processor: Any = transformers.AutoProcessor.from_pretrained(out)
        theirs, info = loaded
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        wrong = [f"{kind}: {', '.join(map(str, info[kind]))}" for kind in kinds if info[kind]]
        if wrong:
            raise _failed(f"{name} reports {'; '.join(wrong)}")
        image = theirs.config.image_token_index
        expected = [image if i == IMAGE_ID else i for i in self._ids or []]
        tokens = processor.tokenizer(PROMPT).input_ids
        if tokens != expected:
            raise _failed(f"{name} tokenizes the prompt to {tokens}, training to {expected}")
        input_ids = self._batch.token_ids.clone()
        input_ids[self._batch.patch_rows.long()] = image
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (self._model.spec.mean, self._model.spec.std))
        pixels = normalise(self._batch.pixels, mean, std).to(self._dtype)
        with torch.no_grad():
            answer = theirs.eval()(input_ids=input_ids[None], pixel_values=pixels).logits[0].float()
        ours = self._logits[:, : vocabulary.kept]
        share = ((answer[:, : vocabulary.kept] - ours).norm() / ours.norm()).item()
        if not share <= _BOUND[self._dtype]:
            raise _failed(f"logits of {name} differ from ours by {share:.3g} of their norm")
        report(f"check: {name} loads it with no missing and no unexpected key, and tokenizes the prompt as training does")
        report(f"check: its logits differ from ours by {share:.1e} of their norm")


def _prompt_ids(source: ModelConfig, legacy: bool | None) -> list[int] | None:
    """The prompt as training tokenizes it, the image as IMAGE_ID; None where there is no tokenizer."""
    found = find_tokenizer(source, legacy)
    if found is None:
        return None
    tokenizer = Tokenizer.load(found.file, found.legacy)
    before, after = PROMPT.split("<image>")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*bos, *tokenizer.encode(before), IMAGE_ID, *tokenizer.encode(after)]


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """transformers without progress bars and advice while the block runs."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    same = found.shape == expected.shape and found.dtype == expected.dtype
    return same and torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def _failed(what: str) -> UserError:
    return UserError(f"--out: the check of the written checkpoint failed: {what}; nothing was kept, please report this line")
