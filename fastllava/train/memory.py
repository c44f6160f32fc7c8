"""What to do when memory runs out, by the place where it did: only remedies that the config leaves open, and that help there."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from fastllava.config import Config, Recompute
from fastllava.errors import UserError
from fastllava.optim.low_bit import is_low_bit

_HOST = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "std::bad_alloc")
"""How PyTorch says in a RuntimeError that the host has no more."""
_PLAN = "fastllava plan CONFIG --gpu NAME tells what fits before anything runs"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of a GPU or of the host, was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST)


@contextmanager
def while_setting_up(config: Config, world: int) -> Iterator[None]:
    """Raises UserError when weights, gradients' places or moments find no memory."""
    with _told(
        lambda what: f"model.llm: weights, and what trains them, do not fit into memory{what}; {_fewer_bytes(config, world)}; {_PLAN}"
    ):
        yield


@contextmanager
def within_a_step(config: Config, world: int, longest: int) -> Iterator[None]:
    """Raises UserError when a step finds no memory; `longest`: tokens of the longest sample, which no micro-batch can be below."""
    with _told(lambda what: _of_a_step(config, world, longest, what)):
        yield


@contextmanager
def while_evaluating(config: Config, longest: int) -> Iterator[None]:
    """Raises UserError when an evaluation finds no memory; `longest`: tokens of the longest held-out sample."""
    rows = config.train.micro_batch_tokens
    fewer = f"write train.micro_batch_tokens={max(longest, rows // 2)}, or " if rows > longest else ""
    # A share stays out of the training for good.
    less = "eval.samples and eval.every_steps" if config.eval.share else "eval.held_out and eval.samples"
    with _told(
        lambda what: (
            f"eval: to evaluate {rows} tokens at a time needs too much memory{what}; {fewer}leave {less} out, "
            "and start the same command again"
        )
    ):
        yield


@contextmanager
def while_writing(config: Config) -> Iterator[None]:
    """Raises UserError when a checkpoint or the result, which pass through the host's memory, find none."""
    mend = "free memory on the host, and start the same command again: it goes on from the last checkpoint"
    with _told(lambda what: f"output_dir: {config.output_dir} could not be written for want of memory{what}; {mend}"):
        yield


@contextmanager
def _told(words) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(words(f" ({reason})" if reason else "")) from None


def _of_a_step(config: Config, world: int, longest: int, what: str) -> str:
    train, mends = config.train, []
    if train.micro_batch_tokens > longest:
        mends.append(f"train.micro_batch_tokens={max(longest, train.micro_batch_tokens // 2)}")
    stronger = get_args(Recompute)[get_args(Recompute).index(train.recompute) + 1 :]
    if stronger:
        mends.append(f"train.recompute={stronger[0]}")
    if world > 1 and not config.parallel.reshard:
        mends.append("parallel.reshard=true")
    if world > 1 and config.parallel.reduce == "step":
        mends.append("parallel.reduce=micro_batch")
    if mends:
        return (
            f"train.micro_batch_tokens: {train.micro_batch_tokens} tokens, with train.recompute={train.recompute}, need too much memory"
            f"{what}; write {', or '.join(mends)}, and start the same command again"
        )
    least = f"a micro-batch of one sample of at most {longest} tokens needs too much memory, with all of it computed again{what}"
    return f"train.micro_batch_tokens: {least}; {_fewer_bytes(config, world)}; {_PLAN}"


def _fewer_bytes(config: Config, world: int) -> str:
    """What makes weights and their state smaller."""
    optim, ways = config.optim, []
    if config.train.precision == "fp32":
        ways.append("write train.precision=bf16")
    if world == 1 and config.stage == "finetune":
        levers = ["optim.state=8bit"] if optim.state == "fp32" else []
        levers += ["optim.master=bf16"] if optim.master == "fp32" and config.train.precision == "bf16" else []
        ways += [f"write {' or '.join(levers)} in a new output_dir, as that is another training"] if levers else []
    if config.parallel.replicas > 1:
        ways.append("write parallel.replicas=1")
    if config.stage == "pretrain":
        ways.append("start more processes with torchrun --nproc-per-node and parallel.frozen=shard")
    elif is_low_bit(optim):
        ways.append("start more processes with torchrun --nproc-per-node, with optim.state=fp32 and optim.master=fp32")
    else:
        ways.append("start more processes with torchrun --nproc-per-node, which share the weights")
    return ", or ".join(ways)
