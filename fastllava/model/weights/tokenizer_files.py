"""The tokenizer's files of a checkpoint: as they were for the original layout; what transformers loads as it is for llava-hf's."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastllava.config import ModelConfig
from fastllava.errors import UserError
from fastllava.model.weights.files import dump_json, read_optional_json, without_code
from fastllava.model.weights.tokenizer_json import IMAGE, PAD, add_image, add_pad, controls_of, from_sentencepiece, load_sentencepiece

_KEY = "model.tokenizer"
_JSON_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_OF_PROCESSORS = ("processor_class", "image_token", "extra_special_tokens", "chat_template", "pad_token")


@dataclass(frozen=True)
class SourceTokenizer:
    """The tokenizer a model was trained with, by its files."""

    file: Path
    """tokenizer.model of sentencepiece, or tokenizer.json."""
    settings: dict[str, Any]
    """tokenizer_config.json beside it."""
    added: dict[int, str]
    """Tokens by id that the files beside it add."""
    names_code: bool
    """Whether those files name code of their own, which is left out of `settings`."""
    legacy: bool
    """Whether text after a control token gets sentencepiece's leading space, as at the start of a text."""

    @property
    def is_sentencepiece(self) -> bool:
        return self.file.suffix != ".json"


@dataclass(frozen=True)
class WrittenTokenizer:
    """The ids that config.json must agree with."""

    image: int
    pad: int


def find_tokenizer(source: ModelConfig, legacy: bool | None) -> SourceTokenizer | None:
    """model.tokenizer, else what lies in model.llm: tokenizer.model before tokenizer.json. None when there is neither."""
    path = source.tokenizer or source.llm
    folder = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else [path / "tokenizer.model", path / "tokenizer.json"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    given = read_optional_json(folder / "tokenizer_config.json", _KEY)
    settings = without_code(given)
    added = {int(index): token for token, index in read_optional_json(folder / "added_tokens.json", _KEY).items()}
    added |= {int(index): _content(token) for index, token in (settings.get("added_tokens_decoder") or {}).items()}
    if legacy is None:
        # Where the config is silent, LlamaTokenizer of the transformers that the original pins takes true.
        legacy = settings.get("legacy") is not False
    return SourceTokenizer(file, settings, added, settings != given, legacy)


def write_original(source: SourceTokenizer, folder: Path, max_tokens: int) -> None:
    """The tokenizer as the original saves it: the files as they were, and the length that training cut at."""
    settings = source.settings
    if source.is_sentencepiece:
        shutil.copyfile(source.file, folder / "tokenizer.model")
        pieces = load_sentencepiece(source.file)
        added = {i: token for i, token in source.added.items() if i >= pieces.get_piece_size() and token not in (IMAGE, PAD)}
        if added:
            dump_json({token: index for index, token in added.items()}, folder / "added_tokens.json")
        names = {name: _content(settings.get(name)) or default for name, default in _NAMES.items()}
        names["pad_token"] = names["unk_token"]
        dump_json(names, folder / "special_tokens_map.json")
        settings = {
            "add_bos_token": True,
            "add_eos_token": False,
            **{name: value for name, value in settings.items() if name not in _OF_PROCESSORS},
            **names,
            "added_tokens_decoder": {str(i): _plain(token) for i, token in sorted({**controls_of(pieces), **added}.items())},
            "legacy": source.legacy,
            "tokenizer_class": "LlamaTokenizer",
        }
    else:
        for name in _JSON_FILES:
            if (source.file.parent / name).is_file():
                shutil.copyfile(source.file.parent / name, folder / name)
    dump_json({**settings, "model_max_length": max_tokens, "padding_side": "right"}, folder / "tokenizer_config.json")


def write_hf(source: SourceTokenizer, folder: Path, image: int | None, max_tokens: int) -> WrittenTokenizer:
    """tokenizer.json and tokenizer_config.json that transformers loads as they are, with `<image>` and a pad token in them.

    `image` is the id that the model's checkpoint has for the image, None to take the next one that is free.
    Raises UserError when the tokenizer cannot be written so.
    """
    given = {name: _content(source.settings.get(name)) for name in (*_NAMES, "pad_token")}
    if source.is_sentencepiece:
        tokenizer = from_sentencepiece(source.file, source.added, source.legacy, source.settings.get("add_bos_token") is not False)
        shutil.copyfile(source.file, folder / "tokenizer.model")
        given = {**{name: token or _NAMES.get(name, "") for name, token in given.items()}, "pad_token": PAD}
    else:
        tokenizer = add_image(Tokenizer.from_file(str(source.file)), source.legacy)
    names = {name: token for name, token in given.items() if token}
    names.setdefault("pad_token", PAD)
    add_pad(tokenizer, names["pad_token"])
    found, pad = tokenizer.token_to_id(IMAGE), tokenizer.token_to_id(names["pad_token"])
    if found is None or pad is None or image not in (None, found):
        raise UserError(
            f"{_KEY}: {source.file} gives {IMAGE} the id {found}, the checkpoint has image_token_index {image}; give its own tokenizer"
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {
        str(index): {name: getattr(token, name) for name in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    settings = {
        # This class takes tokenizer.json as it is; LlamaTokenizer of transformers 5 builds another from its vocabulary.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        **names,
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        "legacy": source.legacy,
        # Without this transformers 4's class gives token_type_ids too, which the model's generate refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_tokens,
        "padding_side": "left",
    }
    dump_json(settings, folder / "tokenizer_config.json")
    dump_json(names, folder / "special_tokens_map.json")
    return WrittenTokenizer(found, pad)


def _plain(token: str) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def _content(token: Any) -> str:
    """A token's spelling; the files write it plainly or as an object."""
    return (token.get("content") if isinstance(token, dict) else token) or ""
