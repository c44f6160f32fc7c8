"""A small tokenizer of Llama's kind, image files, and settings, for the tests of the data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from PIL import Image

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model as Llama's: byte-pair merges, bytes for unknown characters, spaces kept."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = "USER ASSISTANT Human Assistant what is the colour of this image a red dog and two cats near blue house yes no ### [INST]"
    sentences = [" ".join(words.split()[i:] + words.split()[:i]) for i in range(24)] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(model_file: Path) -> Tokenizer:
    """The small model, not legacy."""
    return Tokenizer.load(model_file, legacy=False)


@pytest.fixture(scope="session")
def chatml(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The small model with the marks of chatml."""
    folder = tmp_path_factory.mktemp("chatml")
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 420, "<|im_end|>": 421}')
    return Tokenizer.load(folder, legacy=False)


@pytest.fixture(scope="session")
def llama(golden: Path) -> Callable[[bool], Tokenizer]:
    """The recordings' tokenizer, of Llama's kind, by its `legacy`."""
    both = {legacy: Tokenizer.load(golden / "tokenizer", legacy) for legacy in (False, True)}
    return both.__getitem__


@pytest.fixture
def spec() -> ImageSpec:
    """16 patches of a 56-pixel image, CLIP's mean and deviation."""
    return ImageSpec(56, 16, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., DataConfig]:
    """Writes records and gives the settings that read them; good.png lies in the image folder."""

    def make(records: Any, **settings: Any) -> DataConfig:
        path = tmp_path / "records.json"
        if isinstance(records, bytes):
            path.write_bytes(records)
        else:
            path.write_text(json.dumps(records), encoding="utf-8")
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        if not (images / "good.png").exists():
            Image.new("RGB", (40, 30), (200, 30, 30)).save(images / "good.png")
        defaults: dict[str, Any] = {
            "images": images,
            "image_policy": "pad",
            "template": "v1",
            "group_by_modality": False,
            "prepared_dir": tmp_path / "prepared",
            "workers": 0,
            "max_quarantined_share": 1.0,
        }
        return DataConfig(records=path, **{**defaults, **settings})

    return make
