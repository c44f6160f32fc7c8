"""Whether a template and a tokenizer fit: each mark that the template writes must be one token, or answers would end in pieces of text."""

from fastllava.data.templates import TEMPLATES, Template
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError

_OWN = {"<s>": "bos_token", "</s>": "eos_token"}
"""Marks that stand for the tokenizer's own token, whatever its spelling."""


def check_marks(form: Template, tokenizer: Tokenizer) -> None:
    """Raises UserError, naming template, marks, tokenizer and the templates that fit, where a mark of `form` is no token."""
    missing = _missing(form, tokenizer)
    if not missing:
        return
    fitting = ", ".join(name for name, other in TEMPLATES.items() if not _missing(other, tokenizer))
    listed = " and ".join(f"{mark} ({_OWN[mark]})" if mark in _OWN else repr(mark)[1:-1] for mark in missing)
    wrong = f"'{form.name}' writes {listed}, which {tokenizer.where} has no token for, so that turns would end in pieces of text"
    named = [_OWN[mark] for mark in missing if mark in _OWN]
    remedy = f"name its {' and '.join(named)} in tokenizer_config.json" if named else "give the tokenizer of a model that has them"
    raise UserError(f"data.template: {wrong}; write one that fits ({fitting}), or {remedy}")


def fits(form: Template, tokenizer: Tokenizer) -> bool:
    """Whether each mark of `form` is one token."""
    return not _missing(form, tokenizer)


def mark_ids(form: Template, tokenizer: Tokenizer) -> dict[str, int]:
    """The marks of `form` and of the beginning of a text, with their ids."""
    ids = {"<s>": tokenizer.bos_id, **{mark: tokenizer.control(mark) for mark in form.marks}}
    return {mark: index for mark, index in ids.items() if index is not None}


def _missing(form: Template, tokenizer: Tokenizer) -> list[str]:
    # A beginning token that is to be supervised need not be there: nothing comes before it.
    wanted = (*form.marks, *(text for text in form.everywhere if text not in _OWN))
    return [mark for mark in dict.fromkeys(wanted) if not _is_token(mark, tokenizer)]


def _is_token(mark: str, tokenizer: Tokenizer) -> bool:
    if tokenizer.control(mark) is not None:
        return True
    # sentencepiece keeps a symbol of its user whole, which it takes for text.
    return mark not in _OWN and len(tokenizer.encode(mark, continues=True)) == 1
