"""A tokenizer.json that tokenizes as the training did: from a sentencepiece model, or from a tokenizer.json, with `<image>` added."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastllava.errors import UserError

IMAGE, PAD = "<image>", "<pad>"
# The image's neighbour texts are tokenized each on its own in training, so the text after it begins with a space piece.
_AFTER_IMAGE = normalizers.Replace(Regex(rf"{IMAGE}(?!{IMAGE})(?=[\s\S])"), f"{IMAGE}▁")
# What the converted tokenizer is compared on with sentencepiece itself.
_SAMPLES = (
    "A chat between a curious user and an artificial intelligence assistant. USER: What's 3.5 x 10? ASSISTANT:",
    "def f(x):\n    # a  comment\n\treturn x   +  1\n\n",
    "Größe, naïve café, 東京タワー, привет, 🙂👍🏽, ½ﬁ\u3000e\u0301 \u200b",
    "trailing ",
)


def load_sentencepiece(file: Path) -> SentencePieceProcessor:
    """The sentencepiece model in `file`. Raises UserError when it is none."""
    try:
        return SentencePieceProcessor(model_proto=file.read_bytes())
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"model.tokenizer: {file} cannot be read as a sentencepiece model ({' '.join(str(error).split())[:100]}); fetch it again"
        ) from None


def controls_of(pieces: SentencePieceProcessor) -> dict[int, str]:
    """The unknown, begin and end tokens by id, as far as the model has them."""
    return {i: pieces.id_to_piece(i) for i in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) if i >= 0}


def from_sentencepiece(file: Path, added: Mapping[int, str], legacy: bool, add_bos: bool) -> Tokenizer:
    """The sentencepiece model in `file` as a `tokenizers` one, `added` tokens and `<image>` included.

    `legacy`: text after a control token gets the leading space that text at the start gets. Text after `<image>` always
    does. Raises UserError when the two tokenize differently, or the added ids leave a gap.
    """
    pieces = load_sentencepiece(file)
    size = pieces.get_piece_size()
    scores = [pieces.get_score(i) for i in range(size)]
    spelled = [pieces.id_to_piece(i) for i in range(size)]
    ordinary = [i for i in range(size) if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))]
    has_bytes = any(pieces.is_byte(i) for i in range(size))
    # BPE scores are minus the rank of the merge, unigram's are log probabilities.
    if all(scores[i].is_integer() for i in ordinary):
        vocabulary = {piece: i for i, piece in enumerate(spelled)}
        merges = _merges(vocabulary, scores, ordinary)
        model = models.BPE(vocabulary, merges, unk_token=spelled[pieces.unk_id()], fuse_unk=True, byte_fallback=has_bytes)
    else:
        model = models.Unigram(list(zip(spelled, scores, strict=True)), unk_id=pieces.unk_id(), byte_fallback=has_bytes)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        tokenizer.normalizer = normalizers.Sequence([spaces])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([_special(token) for _, token in sorted(controls_of(pieces).items())])
    for index, token in sorted(added.items()):
        if index >= size and token not in (IMAGE, PAD):
            if index != tokenizer.get_vocab_size(with_added_tokens=True):
                raise UserError(
                    f"model.tokenizer: the token {token!r} beside {file} has the id {index}, which leaves a gap; give it the next free id"
                )
            tokenizer.add_special_tokens([_special(token)])
    if add_bos and pieces.bos_id() >= 0:
        bos = spelled[pieces.bos_id()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, pieces.bos_id())]
        )
    for sample in _SAMPLES:
        if tokenizer.encode(sample, add_special_tokens=False).ids != pieces.encode(sample):
            raise UserError(
                f"model.tokenizer: {file} cannot be written as tokenizer.json, which would tokenize {sample!r} differently; "
                "write --layout llava"
            )
    return add_image(tokenizer, legacy)


def add_image(tokenizer: Tokenizer, legacy: bool) -> Tokenizer:
    """`tokenizer` with the special token `<image>`; one that has it already is left alone."""
    if tokenizer.token_to_id(IMAGE) is not None:
        return tokenizer
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    prefixed_at_start_only = "first" in json.dumps(spec.get("pre_tokenizer"))
    if not legacy and prefixed_at_start_only:
        before = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
        tokenizer.normalizer = normalizers.Sequence([*before, _AFTER_IMAGE])
    # The space is put there by the normaliser, so the image must be found in what the normaliser leaves.
    tokenizer.add_special_tokens([_special(IMAGE, normalized=not legacy and prefixed_at_start_only)])
    return tokenizer


def add_pad(tokenizer: Tokenizer, token: str) -> None:
    """Give `tokenizer` the special token `token` if it has none of that spelling."""
    if tokenizer.token_to_id(token) is None:
        tokenizer.add_special_tokens([_special(token)])


def _special(token: str, normalized: bool = False) -> AddedToken:
    return AddedToken(token, special=True, normalized=normalized)


def _merges(vocabulary: Mapping[str, int], scores: list[float], ordinary: list[int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best score of the third first, as sentencepiece's BPE joins them."""
    spelled = {i: piece for piece, i in vocabulary.items()}
    found = []
    for index in ordinary:
        piece = spelled[index]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
