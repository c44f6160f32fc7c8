"""The check of a written checkpoint: every tensor bit for bit, logits of a fixed image and prompt, and transformers' view of it."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastllava.batch import IMAGE_ID
from fastllava.config import ModelConfig
from fastllava.data.checks import BadRecord, Record
from fastllava.data.conversation import encode_record
from fastllava.data.loader import Sample, pack
from fastllava.data.templates import Template
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError
from fastllava.model.execution import Execution
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

# A few are enough to see the cache at work, and no end token is likely among them.
_NEW_TOKENS = 3
_CONVERSATION = [
    ("human", "<image>\nWhat is shown in the image?"),
    ("gpt", "Two cats, one of them asleep."),
    ("human", "Which?"),
    ("gpt", "The grey one."),
]

Report = Callable[[str], object]


class Check:
    """Asks `model` the fixed question before it is written; `run` asks what was written the same.

    `source` is where the model was read from, `template` what it was trained with. Raises UserError when the tokenizer there
    has ids that the model has not.
    """

    def __init__(self, model: Llava, layout: str, dtype: torch.dtype, source: ModelConfig, template: Template, legacy: bool | None) -> None:
        self._model, self._layout, self._dtype, self._source, self._template = model, layout, dtype, source, template
        found = find_tokenizer(source, legacy)
        self._tokenizer = Tokenizer.load(found.file, found.legacy) if found else None
        self._ids = self._prompt_ids()
        vocab, size = model.llm.config.vocab_size, model.spec.size
        over = [i for i in self._ids or [] if i >= vocab]
        if over:
            raise UserError(f"model.tokenizer: it gives the id {over[0]}, and {source.llm} has {vocab} tokens; give that model's own")
        row = np.arange(size)
        self._image = np.stack([(row[:, None] * 5 + row * 3 + 85 * channel) % 256 for channel in range(3)]).astype(np.uint8)
        self._asked = self._ids or [i if i < 0 else i % vocab for i in (3, 5, IMAGE_ID, 7, 11)]
        self._logits = self._ask(model, self._asked)

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
                raise failed(f"tensor {name} was not read back as it was written")
        if found:
            raise failed(f"tensor {next(iter(found))} was read back and never written")
        report(f"check: all {count} tensors read back bit for bit")

    def _reloaded(self, out: Path, vocabulary: Vocabulary, report: Report) -> None:
        tower = self._source.vision_tower or self._model.origin.tower_folder
        again = self._source.model_copy(update={"llm": out, "vision_tower": tower, "projector": None, "adapter": None, "tokenizer": None})
        reloaded = load_llava(again, Execution(reference_ops(), self._dtype), seed=0)
        logits = self._ask(reloaded, self._asked)[:, : vocabulary.kept]
        if not torch.equal(logits, self._logits[:, : vocabulary.kept]):
            raise failed("logits of the fixed image and prompt differ after reading it back")
        report("check: logits of a fixed image and prompt are equal after reading it back")

    def _transformers(self, out: Path, vocabulary: Vocabulary, report: Report) -> None:
        try:
            import transformers
        except ImportError:
            report("check with transformers: left out, as it is not installed")
            return
        name = f"transformers {transformers.__version__}"
        with _quiet(transformers.utils.logging), torch.no_grad():
            loaded: Any = transformers.LlavaForConditionalGeneration.from_pretrained(out, torch_dtype=self._dtype, output_loading_info=True)
            processor: Any = transformers.AutoProcessor.from_pretrained(out)
            theirs, info = loaded
            kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
            wrong = [f"{kind}: {', '.join(map(str, info[kind]))}" for kind in kinds if info[kind]]
            if wrong:
                raise failed(f"{name} reports {'; '.join(wrong)}")
            image = theirs.config.image_token_index
            self._tokens(name, processor.tokenizer(PROMPT).input_ids, self._ids or [], image)
            report(f"check: {name} loads it with no missing and no unexpected key, and tokenizes the prompt as training does")
            if processor.chat_template is not None and self._tokenizer is not None:
                self._chat(name, processor, self._tokenizer, image, report)
            inputs = processor(text=PROMPT, images=Image.fromarray(self._image.transpose(1, 2, 0)), return_tensors="pt")
            answer = theirs.eval()(**inputs).logits[0].float()
            share = self._share(name, answer[:, : vocabulary.kept], self._logits[:, : vocabulary.kept])
            report(f"check: its logits differ from ours by {share:.1e} of their norm")
            self._generated(name, theirs, inputs, vocabulary)
            report("check: it answers through generate(**processor(text, images)), with our logits at every token")

    def with_peft(self, base: Path, adapters: Path, report: Report) -> None:
        """Compare with what PEFT makes of `adapters` on transformers' model of the folder `base`. Raises UserError."""
        try:
            import peft
            import transformers
        except ImportError:
            report("check with PEFT: left out, as it is not installed")
            return
        name = f"PEFT {peft.__version__}"
        with _quiet(transformers.utils.logging), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            loaded: Any = transformers.LlavaForConditionalGeneration.from_pretrained(base, torch_dtype=self._dtype)
            theirs = peft.PeftModel.from_pretrained(loaded, adapters).eval()
            image, spec = loaded.config.image_token_index, self._model.spec
            ids = [token for i in self._asked for token in ([image] * spec.patches if i == IMAGE_ID else [i])]
            pixels = normalise(torch.from_numpy(self._image)[None], torch.tensor(spec.mean), torch.tensor(spec.std))
            answer = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels.to(self._dtype)).logits[0].float()
        kept = self._model.llm.config.vocab_size
        share = self._share(name, answer[:, :kept], self._logits)
        report(f"check: {name} and transformers {transformers.__version__} load it; logits differ from ours by {share:.1e} of their norm")

    def _tokens(self, name: str, found: list[int], expected: list[int], image: int) -> None:
        expected = [image if i == IMAGE_ID else i for i in expected]
        if found != expected:
            raise failed(f"{name} tokenizes the prompt to {found}, training to {expected}")

    def _chat(self, name: str, processor: Any, tokenizer: Tokenizer, image: int, report: Report) -> None:
        """A conversation as training writes it, and the part of it that is supervised."""
        try:
            # Of answers alone: what a template supervises everywhere, a chat template cannot mark.
            form = replace(self._template, everywhere=())
            expected = encode_record(Record("", ("image",), _CONVERSATION), form, tokenizer, 2**20)
        except BadRecord as error:
            report(f"check of the chat template: left out, as training would refuse the conversation it takes ({error})")
            return
        messages = [{"role": "user" if role == "human" else "assistant", "content": _content(text)} for role, text in _CONVERSATION]
        text = processor.apply_chat_template(messages, tokenize=False)
        self._tokens(name, processor.tokenizer(text).input_ids, expected.ids, image)
        # Of a tokenizer's own, without the beginning token; that of a processor counts characters before it repeats the image.
        found = processor.tokenizer.apply_chat_template(
            [{**message, "content": text} for message, (_, text) in zip(messages, _CONVERSATION, strict=True)],
            chat_template=processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        skipped = len(expected.ids) - len(found["input_ids"])
        marked = [at + skipped for at, yes in enumerate(found["assistant_masks"]) if yes]
        supervised = [at for begin, end in expected.supervised for at in range(begin, end)]
        if marked != supervised:
            raise failed(f"{name} takes the tokens {marked} of a conversation for the answers, training {supervised}")
        more = f" (it cannot mark what {form.name} supervises in questions)" if self._template.everywhere else ""
        report(f"check: its chat template writes, and marks as answers, what training does{more}")

    def _generated(self, name: str, theirs: Any, inputs: Any, vocabulary: Vocabulary) -> None:
        options = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        try:
            answer = theirs.generate(**inputs, **options)
        except (ValueError, TypeError, RuntimeError) as error:
            raise failed(f"generate of {name} raises: {' '.join(str(error).split())[:200]}") from error
        new = answer.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        ours = self._ask(self._model, [*self._asked, *(i % vocabulary.kept for i in new)])
        ours = ours[-len(new) - 1 : -1, : vocabulary.kept]
        self._share(f"generate of {name}", torch.cat(answer.logits).float()[:, : vocabulary.kept], ours)

    def _share(self, name: str, found: Tensor, ours: Tensor) -> float:
        """How far the logits of `name` are from ours, as a share of their norm."""
        share = ((found - ours).norm() / ours.norm()).item() if found.shape == ours.shape else math.inf
        if not share <= _BOUND[self._dtype]:
            raise failed(f"logits of {name} differ from ours by {share:.3g} of their norm")
        return share

    def _ask(self, model: Llava, ids: list[int]) -> Tensor:
        """fp32 [T, V]: logits of `ids`, in which IMAGE_ID is the fixed image."""
        sample = Sample(np.array(ids, np.int32), np.zeros((0, 2), np.int32), [self._image], 1.0)
        with torch.no_grad():
            return model.logits(pack([sample], model.spec, len(ids) + model.spec.patches))

    def _prompt_ids(self) -> list[int] | None:
        """The prompt as training tokenizes it, the image as IMAGE_ID; None where there is no tokenizer."""
        if self._tokenizer is None:
            return None
        before, after = PROMPT.split("<image>")
        bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        return [*bos, *self._tokenizer.encode(before), IMAGE_ID, *self._tokenizer.encode(after)]


def _content(text: str) -> list[dict[str, str]]:
    """A turn as chat templates take it."""
    shown = [{"type": "image"}] if "<image>" in text else []
    return [*shown, {"type": "text", "text": text.replace("<image>", "").strip()}]


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


def failed(what: str) -> UserError:
    """The error of a check that does not hold."""
    return UserError(f"--out: the check of the written checkpoint failed: {what}; nothing was kept, please report this line")
