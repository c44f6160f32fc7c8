"""Text to token ids: a sentencepiece model, or a tokenizer.json where there is no tokenizer.model.

Control tokens (<s>, </s>, ...) come from the template alone. Text never becomes one, whatever it spells.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastllava.console.printable import quoted
from fastllava.data.added_tokens import Added, Found, Settings, Words, read_json, read_settings
from fastllava.data.encoders import Encoder, JsonEncoder, SentencePieceEncoder, legacy_of_json
from fastllava.data.patterns import check_patterns
from fastllava.errors import UserError, or_download

# Of transformers 4.37.2 (LlamaTokenizer, `legacy=None`), which the original pins; Vicuna v1.5 says false in its config.
LEGACY_WHEN_UNSAID = True


class Tokenizer:
    """A tokenizer as `LlamaTokenizer` of transformers 4.37.2 uses it in the original. `load` makes one. Picklable.

    `legacy` says what happens to text right after a control token or an added one: True puts sentencepiece's leading
    space before it, as at the start of a text, False does not.
    """

    def __init__(self, model: bytes, is_json: bool, settings: Settings, legacy: bool, where: str) -> None:
        self._state = (model, is_json, settings, legacy, where)
        self.legacy, self.where = legacy, where
        encoder: Encoder = (JsonEncoder if is_json else SentencePieceEncoder)(model, legacy, where)
        self._encoder = encoder
        # A tokenizer.json lists its added tokens itself, and finds in a text those that are words of it.
        added: dict[str, Added] = {} if is_json else settings.added
        self._controls = encoder.controls() | {text: token.index for text, token in added.items()}
        special = encoder.specials() | {text for text, token in added.items() if token.special}
        self.literals = frozenset(special | (settings.special & self._controls.keys()))
        """How the control tokens are spelled; the original would take these in a user's text for control tokens."""
        self.swallowing = frozenset(text for text, token in settings.added.items() if token.rstrip)
        """Control tokens that take the blanks behind them along (rstrip of transformers)."""
        self._words = Words(added, encoder.specials())
        self._word_of = self._words.spelling()
        self._hidden = {self._controls[text] for text in self.literals}
        names = settings.names
        self._bos = self._id(names.get("bos_token"), encoder.bos_id)
        begins = encoder.bos_id is not None if settings.add_bos is None else settings.add_bos
        self.bos_id = self._bos if begins else None
        self.eos_id = self._named_eos(names.get("eos_token"), encoder.eos_id)
        self.unk_id = self._id(names.get("unk_token"), encoder.unk_id)
        if self.unk_id in (self._bos, self.eos_id):
            # Byte-level models name a control token there, as they know every text.
            self.unk_id = None
        self.vocab_size = max(encoder.size, *(i + 1 for i in self._controls.values()), 0)
        """Ids are below this."""
        self.text_size = max(encoder.text_size, *(i + 1 for i in self._word_of), 0)
        """Ids that a text becomes are below this: all but those of control tokens that were added."""
        said = {"added": {text: list(token) for text, token in added.items()}, "names": names, "special": sorted(settings.special)}
        state = json.dumps([hashlib.sha256(model).hexdigest(), is_json, said, settings.add_bos, legacy], sort_keys=True)
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
            raise UserError(f"{path}: no such file or folder; give the folder or file of a tokenizer{or_download(path)}")
        try:
            model = found.read_bytes()
        except OSError as error:
            raise UserError(f"{found}: cannot be read ({error.strerror}); give the folder or file of a tokenizer") from None
        is_json = found.suffix == ".json"
        if is_json:
            check_patterns(model, str(found))
        if legacy is None:
            given = read_json(folder / "tokenizer_config.json").get("legacy")
            unsaid = legacy_of_json(model) if is_json else LEGACY_WHEN_UNSAID
            legacy = given if isinstance(given, bool) else unsaid
        return cls(model, is_json, read_settings(folder), legacy, str(found))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, self._state

    def control(self, literal: str) -> int | None:
        """The id of the control token that a template writes as `literal`; `<s>` and `</s>` mean this model's own. None: it has none."""
        if literal == "<s>":
            return self._controls.get(literal) if self._bos is None else self._bos
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
        bare = continues and not self.legacy
        if self._word_of and (found := self._words.find("".join(parts))):
            return self._encode_around(parts, found, bare)
        return self._encoder.encode_parts(parts, bare)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without control tokens and image markers."""
        texts: list[str] = []
        run: list[int] = []
        bare = not self.legacy
        for i in ids:
            if i in self._word_of:
                texts += [self._encoder.decode(run, bare and bool(texts)), self._word_of[i]]
                run = []
            elif i >= 0 and i not in self._hidden:
                run.append(i)
        return "".join([*texts, self._encoder.decode(run, bare and bool(texts))])

    def piece(self, token: int) -> str:
        """The token as the vocabulary spells it."""
        names = {i: name for name, i in self._controls.items()}
        return names.get(token) or self._encoder.piece(token)

    def _encode_around(self, parts: Sequence[str], found: list[Found], bare: bool) -> tuple[list[int], list[int]]:
        """`encode_parts` where the text spells added tokens: the stretches between them are texts of their own."""
        borders = list(accumulate(map(len, parts), initial=0))
        text = "".join(parts)
        ids: list[int] = []
        counts = [0] * len(parts)

        def stretch(begin: int, end: int, bare: bool) -> None:
            first, last = (bisect_right(borders, at, hi=len(parts)) - 1 for at in (begin, max(begin, end - 1)))
            cut = [text[max(begin, borders[n]) : min(end, borders[n + 1])] for n in range(first, last + 1)]
            new, numbers = self._encoder.encode_parts(cut, bare)
            ids.extend(new)
            for n, number in enumerate(numbers, first):
                counts[n] += number

        def token(at: int, index: int) -> None:
            ids.append(index)
            counts[bisect_right(borders, at, hi=len(parts)) - 1] += 1

        at = 0
        for begin, end, index in found:
            if begin > at:
                stretch(at, begin, bare)
            elif at == 0 and index is not None and not bare and not self.legacy and (prefix := self._encoder.prefix_id) is not None:
                # The space that a text begins with stands by itself where an added token comes first.
                token(begin, prefix)
            if index is not None:
                token(begin, index)
            at, bare = end, not self.legacy
        if at < len(text):
            stretch(at, len(text), bare)
        return ids, counts

    def _id(self, name: str | None, default: int | None) -> int | None:
        if name is None:
            return default
        found = self._controls.get(name)
        return self._encoder.token_id(name) if found is None else found

    def _named_eos(self, name: str | None, default: int | None) -> int | None:
        """Raises UserError where the files name a token that the vocabulary lacks: answers would end in another."""
        found = self._id(name, default)
        if name is not None and found is None:
            raise UserError(f"{self.where}: has no token {quoted(name, 40)}, which the files beside it name as eos_token; name one it has")
        return found
