"""Text to token ids: a sentencepiece model, or a tokenizer.json where there is no tokenizer.model.

Control tokens (<s>, </s>, ...) come from the template alone. Text never becomes one, whatever it spells.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastllava.data.encoders import Encoder, JsonEncoder, SentencePieceEncoder, legacy_of_json
from fastllava.errors import UserError

# Of transformers 4.37.2 (LlamaTokenizer, `legacy=None`), which the original pins; Vicuna v1.5 says false in its config.
LEGACY_WHEN_UNSAID = True


class Tokenizer:
    """A tokenizer as `LlamaTokenizer` of transformers 4.37.2 uses it in the original. `load` makes one. Picklable.

    `legacy` says what happens to text right after a control token: True puts sentencepiece's leading space before it,
    as at the start of a text, False does not.
    """

    def __init__(self, model: bytes, is_json: bool, settings: dict[str, Any], legacy: bool, where: str) -> None:
        self._state = (model, is_json, settings, legacy, where)
        self.legacy = legacy
        self._encoder: Encoder = (JsonEncoder if is_json else SentencePieceEncoder)(model, legacy, where)
        # A tokenizer.json lists its added tokens itself.
        self._controls = self._encoder.controls() | ({} if is_json else settings["added"])
        self.literals = frozenset(self._encoder.specials() | (set() if is_json else set(settings["added"])))
        """How the control tokens are spelled; the original would take these in a user's text for control tokens."""
        names = settings["names"]
        self.bos_id = self._encoder.bos_id if settings["add_bos"] is None else None
        if settings["add_bos"] or (settings["add_bos"] is None and self.bos_id is not None):
            self.bos_id = self._id(names.get("bos_token"), self._encoder.bos_id)
        self.eos_id = self._id(names.get("eos_token"), self._encoder.eos_id)
        self.unk_id = self._id(names.get("unk_token"), self._encoder.unk_id)
        self.vocab_size = max(self._encoder.size, *(i + 1 for i in self._controls.values()), 0)
        state = json.dumps([hashlib.sha256(model).hexdigest(), is_json, settings, legacy], sort_keys=True)
        self.digest = hashlib.sha256(state.encode()).hexdigest()

    @classmethod
    def load(cls, path: Path, legacy: bool | None = None) -> "Tokenizer":
        """The tokenizer in the folder (or of the file) `path`.

        `legacy` None takes tokenizer_config.json's word. Where it has none, a sentencepiece model is legacy (the default
        of transformers 4.37.2, which the original runs on), and a tokenizer.json is what its own pre-tokenizer says.
        Raises UserError that names the file.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            candidates = [path / "tokenizer.model", path / "tokenizer.json"]
            found = next((file for file in candidates if file.is_file()), None)
            if found is None:
                raise UserError(f"{path}: holds no tokenizer.model and no tokenizer.json; give the folder or file of a tokenizer")
        elif path.is_file():
            found = path
        else:
            raise UserError(f"{path}: no such file or folder; give the folder or file of a tokenizer")
        try:
            model = found.read_bytes()
        except OSError as error:
            raise UserError(f"{found}: cannot be read ({error.strerror}); give the folder or file of a tokenizer") from None
        config = _read_json(folder / "tokenizer_config.json")
        if legacy is None:
            given = config.get("legacy")
            unsaid = legacy_of_json(model) if found.suffix == ".json" else LEGACY_WHEN_UNSAID
            legacy = given if isinstance(given, bool) else unsaid
        return cls(model, found.suffix == ".json", _settings(folder, config), legacy, str(found))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, self._state

    def control(self, literal: str) -> int | None:
        """The id of the control token that a template writes as `literal`; `<s>` and `</s>` mean this model's own. None: it has none."""
        if literal == "<s>":
            return self.bos_id
        if literal == "</s>":
            return self.eos_id
        return self._controls.get(literal)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of plain text, without <s>. `continues`: the text follows a control token."""
        return self.encode_parts([text], continues)[0]

    def encode_parts(self, parts: Sequence[str], continues: bool = False) -> tuple[list[int], list[int]]:
        """Ids of the joined parts, tokenized as one text, and how many of them belong to each part.

        A token over a border belongs to the part in which it starts.
        """
        return self._encoder.encode_parts(parts, continues and not self.legacy)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without control tokens and image markers."""
        controls = set(self._controls.values())
        return self._encoder.decode([i for i in ids if i >= 0 and i not in controls])

    def piece(self, token: int) -> str:
        """The token as the vocabulary spells it."""
        names = {i: name for name, i in self._controls.items()}
        return names.get(token) or self._encoder.piece(token)

    def _id(self, name: str | None, default: int | None) -> int | None:
        return default if name is None else self._controls.get(name, default)


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the files beside the model add to it: tokens, and which of them begin and end a text."""
    added: dict[str, int] = {}
    for token, index in _read_json(folder / "added_tokens.json").items():
        added[str(token)] = int(index)
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        added[_content(token) or ""] = int(index)
    names = _read_json(folder / "special_tokens_map.json")
    names = {key: _content(config.get(key, names.get(key))) for key in ("bos_token", "eos_token", "unk_token")}
    return {
        "added": {token: index for token, index in sorted(added.items()) if token},
        "names": {key: name for key, name in names.items() if name},
        "add_bos": config.get("add_bos_token") if isinstance(config.get("add_bos_token"), bool) else None,
    }


def _content(token: Any) -> str | None:
    """A token's spelling; the files write it plainly or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore the file or take it away") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where an object is expected; restore the file or take it away")
    return value
