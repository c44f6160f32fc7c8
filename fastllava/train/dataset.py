"""The data of a run: its tokenizer, and its prepared set, made or found."""

from dataclasses import dataclass
from pathlib import Path

from fastllava.batch import ImageSpec
from fastllava.config import Config
from fastllava.console.printable import quoted
from fastllava.console.speaker import Say
from fastllava.data.marks import check_marks, mark_ids
from fastllava.data.prepared import PreparedSet, prepare
from fastllava.data.templates import template
from fastllava.data.tokenizer import Tokenizer
from fastllava.data.workers import Board
from fastllava.distributed.processes import Processes
from fastllava.errors import UserError
from fastllava.model.weights import read_origin
from fastllava.train.state.checkpoint import begun_with


def load_tokenizer(path: Path, legacy: bool | None, key: str) -> Tokenizer:
    """Tokenizer.load, its errors beginning with the `key` that `path` came from."""
    try:
        return Tokenizer.load(path, legacy)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def prepare_data(config: Config, say: Say, board: Board | None = None, keep: str | None = None) -> tuple[Tokenizer, ImageSpec, PreparedSet]:
    """The tokenizer, what the tower wants to see, and the prepared set, made or reused; what is being read stands on the `board`.

    `keep`: digest of the set that a run began with. Raises UserError when tokenizer, data and decoder do not fit each other,
    before any record is read.
    """
    origin = read_origin(config.model)
    path = config.model.tokenizer or config.model.llm
    tokenizer = load_tokenizer(path, config.data.legacy, "model.tokenizer")
    form = template(config.data.template)
    check_marks(form, tokenizer)
    # A whole LLaVA has no use for the rows of its image and pad token: no text and no template becomes those.
    used = max(tokenizer.text_size, *(index + 1 for index in mark_ids(form, tokenizer).values()), 0)
    if tokenizer.vocab_size > max(origin.rows, origin.llm.vocab_size) or used > origin.llm.vocab_size:
        last = quoted(tokenizer.piece(tokenizer.vocab_size - 1), 40)
        raise UserError(
            f"model.tokenizer: {path} has {tokenizer.vocab_size} tokens (the last is {last}), but model.llm has embeddings for "
            f"{origin.llm.vocab_size}; give the tokenizer that belongs to model.llm"
        )
    if origin.llm.window is not None and config.data.max_tokens > origin.llm.window:
        window = origin.llm.window
        raise UserError(f"data.max_tokens: {config.data.max_tokens} is more than model.llm's attention window; write at most {window}")
    return tokenizer, origin.spec, prepare(config.data, tokenizer, origin.spec, say, board, keep)


def prepare_held_out(config: Config, tokenizer: Tokenizer, spec: ImageSpec, say: Say, board: Board | None = None) -> PreparedSet | None:
    """The prepared set of the file that `eval.held_out` names, made or reused; None where it names none."""
    records = config.eval.held_out
    if not isinstance(records, Path):
        return None
    data = config.data.model_copy(update={"records": records})
    try:
        return prepare(data, tokenizer, spec, say, board)
    except UserError as error:
        raise UserError(f"eval.held_out: {str(error).removeprefix('data.records: ')}") from None


@dataclass(frozen=True)
class Opened:
    """The data of a run, as every process has it."""

    tokenizer: Tokenizer
    spec: ImageSpec
    """What the tower wants to see."""
    prepared: PreparedSet
    held_out: PreparedSet | None
    """That of a file of held-out records."""


def open_data(config: Config, say: Say, processes: Processes, board: Board | None = None) -> Opened:
    """The data of the run of `config`: the first process makes the prepared sets or finds them, all open them."""

    def prepared() -> tuple[Tokenizer, ImageSpec, Path, Path | None]:
        tokenizer, spec, made = prepare_data(config, say, board, begun_with(config.output_dir))
        held_out = prepare_held_out(config, tokenizer, spec, say, board)
        return tokenizer, spec, made.folder, None if held_out is None else held_out.folder

    tokenizer, spec, folder, held_out = processes.on_first(prepared)
    with processes.together():
        return Opened(tokenizer, spec, PreparedSet.open(folder), None if held_out is None else PreparedSet.open(held_out))
