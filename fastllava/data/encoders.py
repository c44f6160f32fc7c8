"""The two kinds of tokenizer model behind `Tokenizer`: sentencepiece and tokenizers (tokenizer.json)."""

import bisect
import json
import re
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, Protocol

import sentencepiece
import tokenizers

from fastllava.console.printable import quoted
from fastllava.data.checks import BadRecord
from fastllava.errors import UserError

_SPACE = "▁"
_WORD = re.compile(r"\n| *[^ \n]+| +")
_LONGEST_WORD = 40
_MOST_WORDS = 2**17
# Protocol buffers merge a field that comes twice, the last value winning; so these bytes after a sentencepiece model
# set normalizer_spec.add_dummy_prefix (field 3 of ModelProto, then field 3 of NormalizerSpec).
_WITH_PREFIX = b"\x1a\x02\x18\x01"
_WITHOUT_PREFIX = b"\x1a\x02\x18\x00"
# Text that normalisers other than the identity change.
_PROBE = "ﬁ½Ａ\u3000e\u0301 \u200b\t\n  x"


class Encoder(Protocol):
    """Text to ids, knowing nothing of templates."""

    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    prefix_id: int | None
    """The token of the space that a text begins with, where it may stand by itself."""
    size: int
    """Ids are below this."""
    text_size: int
    """Ids that a text becomes are below this."""

    def controls(self) -> dict[str, int]:
        """Spelling and id of the tokens that no text becomes, and of those added to the vocabulary."""
        ...

    def specials(self) -> set[str]:
        """Those of them that the original would find in a text."""
        ...

    def encode_parts(self, parts: Sequence[str], bare: bool) -> tuple[list[int], list[int]]: ...
    def decode(self, ids: list[int], continues: bool) -> str: ...
    def piece(self, token: int) -> str: ...

    def token_id(self, piece: str) -> int | None:
        """The id of a piece of the vocabulary, or None."""
        ...


class _Words(dict[str, list[int]]):
    """Ids of words, encoded when first asked for. Full, it takes no more: the frequent words have come by then."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __missing__(self, word: str) -> list[int]:
        ids = self._model.encode(word)
        if len(word) <= _LONGEST_WORD and len(self) < _MOST_WORDS:
            self[word] = ids
        return ids


class SentencePieceEncoder:
    """sentencepiece: `bare` text gets no leading space."""

    def __init__(self, model: bytes, legacy: bool, where: str) -> None:
        try:
            # The slow LlamaTokenizer of transformers leaves the leading space to the model when legacy, and else adds it itself.
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=model if legacy else model + _WITH_PREFIX)
            self._bare: Any = sentencepiece.SentencePieceProcessor(model_proto=model + _WITHOUT_PREFIX)
        except (RuntimeError, TypeError, ValueError):
            raise UserError(f"{where}: is no sentencepiece model; give a tokenizer.model of sentencepiece, or a tokenizer.json") from None
        self.size = self.text_size = int(self._model.vocab_size())
        self.prefix_id = self.token_id(_SPACE)
        ids = (self._model.bos_id(), self._model.eos_id(), self._model.unk_id())
        self.bos_id, self.eos_id, self.unk_id = (None if i < 0 else int(i) for i in ids)
        kinds = (self._model.is_control, self._model.is_unknown)
        self._controls = {self._model.id_to_piece(i): i for i in range(self.size) if any(kind(i) for kind in kinds)}
        plain = [self._model.id_to_piece(i) for i in range(self.size) if not self._model.is_byte(i) and not self._model.is_control(i)]
        self._pairs = {piece[i : i + 2] for piece in plain for i in range(len(piece) - 1)}
        self._identity = self._bare.normalize(_PROBE) == _PROBE.replace(" ", _SPACE)
        self._words = _Words(self._bare) if self._can_go_by_word(plain) else None

    def controls(self) -> dict[str, int]:
        return dict(self._controls)

    def specials(self) -> set[str]:
        return set(self._controls)

    def encode_parts(self, parts: Sequence[str], bare: bool) -> tuple[list[int], list[int]]:
        """Ids of the joined parts and their number in each part, as if the whole were encoded at once.

        Where no piece of the vocabulary spans a border, no merge can cross it, and the two sides are encoded apart.
        """
        ids: list[int] = []
        counts: list[int] = []
        last = ""
        for part in parts:
            if part and last and not self._is_border(last, part[0]):
                return self._encode_at_once(parts, bare)
            new = self._encode(part, bare or last != "") if part else []
            ids += new
            counts.append(len(new))
            last = part[-1:] or last
        return ids, counts

    def _encode_at_once(self, parts: Sequence[str], bare: bool) -> tuple[list[int], list[int]]:
        """A part ends where as many ids have gone by as the text so far has when it is encoded by itself."""
        ids = self._encode("".join(parts), bare)
        ends = [min(len(self._encode("".join(parts[:n]), bare)), len(ids)) for n in range(1, len(parts))]
        ends = list(accumulate([0, *ends, len(ids)], max))
        return ids, [end - begin for begin, end in pairwise(ends)]

    def decode(self, ids: list[int], continues: bool) -> str:
        return (self._bare if continues else self._model).decode(ids)

    def piece(self, token: int) -> str:
        return self._model.id_to_piece(token) if token < self.size else f"[{token}]"

    def token_id(self, piece: str) -> int | None:
        found = int(self._model.piece_to_id(piece))
        return found if self._model.id_to_piece(found) == piece else None

    def _encode(self, text: str, bare: bool) -> list[int]:
        if self._words is None or _SPACE in text:
            return (self._bare if bare else self._model).encode(text)
        found = _WORD.findall(text if bare or not text else " " + text)
        return list(chain.from_iterable(map(self._words.__getitem__, found)))

    def _can_go_by_word(self, plain: list[str]) -> bool:
        """Whether no merge crosses from a word to the space after it or over a line end, so that words can be looked up.

        That needs pieces with spaces at their front alone, line ends as bytes, and byte-pair merges (whose scores are
        whole numbers): a unigram model weighs the text as a whole.
        """
        return (
            self._identity
            and not any(_SPACE in piece.lstrip(_SPACE) or "\n" in piece for piece in plain)
            and self._model.is_byte(self._model.piece_to_id("<0x0A>"))
            and all(float(self._model.get_score(i)).is_integer() for i in range(self.size))
            and self._model.encode("x") == self._bare.encode(" x")
        )

    def _is_border(self, left: str, right: str) -> bool:
        pair = (left + right).replace(" ", _SPACE)
        return self._identity and pair not in self._pairs


class JsonEncoder:
    """tokenizers: `bare` text gets no leading space where the model would put one."""

    def __init__(self, model: bytes, legacy: bool, where: str) -> None:
        try:
            spec = json.loads(model)
            self._model = _text_only(tokenizers.Tokenizer.from_str(json.dumps(spec)))
            self._bare = _text_only(tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(spec))))
        except Exception as error:  # tokenizers raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{where}: is no tokenizer.json of the tokenizers library ({reason}); give the file or folder of one") from None
        added = self._model.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        every = set(self._model.get_vocab(with_added_tokens=True).values())
        # Ids may leave holes, so that the highest counts and not their number.
        self.size = max(every, default=-1) + 1
        self.text_size = max(every - special, default=-1) + 1
        self.prefix_id: int | None = None
        self._controls = {token.content: i for i, token in added.items()}
        self.bos_id = self._first(where)
        self.eos_id = next((self._controls[name] for name in ("</s>", "<|im_end|>", "<|endoftext|>") if name in self._controls), None)
        unk = getattr(self._model.model, "unk_token", None)
        self.unk_id = None if unk is None else self._model.token_to_id(unk)

    def controls(self) -> dict[str, int]:
        return dict(self._controls)

    def specials(self) -> set[str]:
        # The others (runs of spaces, say) are text to this tokenizer.
        return {token.content for token in self._model.get_added_tokens_decoder().values() if token.special}

    def encode_parts(self, parts: Sequence[str], bare: bool) -> tuple[list[int], list[int]]:
        """Ids of the joined parts and their number in each part."""
        try:
            encoded = (self._bare if bare else self._model).encode("".join(parts), add_special_tokens=False)
        except BaseException as error:
            # What tokenizers raises when its Rust gives up is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise BadRecord("tokenizer_failed", f"the tokenizer breaks off ({quoted(str(error), 120)}); shorten the text") from None
        borders, length = [], 0
        for part in parts:
            length += len(part)
            borders.append(length)
        starts = [start for start, _ in encoded.offsets]
        ends = [bisect.bisect_left(starts, border) for border in borders[:-1]] + [len(starts)]
        return list(encoded.ids), [end - begin for begin, end in pairwise([0, *ends])]

    def decode(self, ids: list[int], continues: bool) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        return self._model.id_to_token(token) or f"[{token}]"

    def token_id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def _first(self, where: str) -> int | None:
        """The control token that texts begin with; those they end with are the templates' affair."""
        plain, whole = (self._model.encode("a", add_special_tokens=special).ids for special in (False, True))
        before = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        if before > 1:
            raise UserError(f"{where}: begins texts with {before} tokens; give a tokenizer that begins them with one, or none")
        return whole[0] if before else None


def legacy_of_json(model: bytes) -> bool:
    """Whether a tokenizer.json puts its leading space after control tokens too, not at the start of the text alone."""
    return b'"prepend_scheme":"first"' not in b"".join(model.split())


def _text_only(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Reads the spelling of a control token as text."""
    model.encode_special_tokens = True
    model.no_truncation()
    model.no_padding()
    return model


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json without the space it puts before a text."""

    def change(part: Any) -> Any:
        match part:
            case {"type": "Sequence"}:
                key = "normalizers" if "normalizers" in part else "pretokenizers"
                return {**part, key: [changed for inner in part[key] if (changed := change(inner)) is not None]}
            case {"type": "Prepend"}:
                return None
            case {"type": "Metaspace"}:
                return {**part, "prepend_scheme": "never"}
            case {"type": "ByteLevel"}:
                return {**part, "add_prefix_space": False}
        return part

    return {**spec, "normalizer": change(spec.get("normalizer")), "pre_tokenizer": change(spec.get("pre_tokenizer"))}
