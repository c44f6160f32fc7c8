"""The processes of one run, as torchrun starts them: who is who, what they agree on, and whose word the user hears.

Two groups: the default one moves tensors (nccl between GPUs, gloo between CPUs), and `Processes.host` is gloo on the hosts,
for agreements between steps. An agreement never waits for a device, and its timeout is long: data may take hours to prepare.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage] (documented, like all of the stores)
from torch.distributed.rendezvous import rendezvous

from fastllava.errors import DiskElsewhere, PeerLost, ToldElsewhere, UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=24)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed")
"""What gloo says when a process at the other end has gone."""


@dataclass(frozen=True)
class Processes:
    """This process and the others of the run; one that is alone agrees with itself and talks to nobody."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Its number on this machine, and that of its GPU."""
    host: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that prepares, speaks and writes."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that every process runs, and in which none may wait for another: when it fails in one, all raise that error."""
        failed = None
        try:
            yield
        except Exception as error:
            failed = error
        self._raise_any(failed)

    @contextmanager
    def first_speaks(self) -> Iterator[None]:
        """A block in which every process comes to the same UserError, if to any: only the first of them tells it."""
        try:
            yield
        except UserError as error:
            raise error if self.first else ToldElsewhere(str(error)) from None

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first process, which alone runs it; when it fails, its error on every process."""
        with self.together():
            outcome: list[Any] = [action() if self.first else None]
        if self.world > 1:
            with collective():
                dist.broadcast_object_list(outcome, src=0, group=self.host)
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """The `value` of each process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with collective():
            dist.all_gather_object(values, value, group=self.host)
        return values

    def vote(self, failed: Exception | None = None, *numbers: int) -> list[int]:
        """The largest value that each of `numbers` has on any process. When one `failed`, all raise its error instead.

        One all-reduce of a few bytes between the hosts.
        """
        if self.world == 1:
            self._raise_any(failed)
            return list(numbers)
        values = torch.tensor([int(failed is not None), *numbers], dtype=torch.int32)
        with collective():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.host)
        any_failed, *largest = values.tolist()
        if any_failed:
            self._raise_any(failed)
        return largest

    def _raise_any(self, failed: Exception | None) -> None:
        """Raise the error of the first process that `failed`, on all of them; nothing happens where none did."""
        for rank, error in enumerate(self.gather(_for_others(failed))):
            if error is not None:
                if failed is not None and rank == self.rank:
                    raise failed
                raise _anothers(error) from None

    def total(self, value: Tensor) -> Tensor:
        """`value`, summed over the processes in place. On GPUs the host does not wait."""
        if self.world > 1:
            dist.all_reduce(value)
        return value


ALONE = Processes()
"""A run in one process."""


@contextmanager
def processes(copy_engine: bool = False) -> Iterator[Processes]:
    """The processes that torchrun started, connected until the block ends; without torchrun, or for one, this one alone.

    `copy_engine`: NCCL may gather without any multiprocessor. A default process group that is there already is used and left as it is.
    Raises UserError when torchrun's variables do not make sense.
    """
    mine = not dist.is_initialized()
    world = _number("WORLD_SIZE", 1) if mine else dist.get_world_size()
    if world == 1:
        yield ALONE
        return
    local_rank = _number("LOCAL_RANK")
    gpus = torch.cuda.device_count()
    if local_rank < gpus:
        torch.cuda.set_device(local_rank)
    if copy_engine:
        # NCCL reads it when it connects; 2 is its policy of zero CTAs (PyTorch's page on symmetric memory, copy engine collectives).
        os.environ.setdefault("NCCL_CTA_POLICY", "2")
    try:
        if mine:
            store, rank, _ = next(rendezvous("env://", _number("RANK"), world))
            # torchrun may keep one store over restarts, which still has the addresses of processes that have ended.
            store = PrefixStore(f"start {_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=world)
        host: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        mend = "see that MASTER_ADDR and MASTER_PORT can be reached from all, and start the same command again"
        raise UserError(f"torchrun: process {os.environ.get('RANK')} cannot connect to the others ({reason}); {mend}") from None
    yield Processes(dist.get_rank(), world, local_rank, host)
    # Only after a good end: when one process has failed, taking nccl down would wait for it. The others' exit frees all.
    dist.destroy_process_group(None if mine else host)


@contextmanager
def collective() -> Iterator[None]:
    """A block of collective operations: when one fails because a process has gone, PeerLost is raised."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST):
            raise PeerLost("another process of this run has ended") from None
        raise


def _for_others(error: Exception | None) -> Exception | None:
    """`error` as it can be sent: one of a class of a library's own may not survive the journey, and only its process can tell more."""
    if error is None or isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return OSError(str(error)) if error.errno is None else OSError(error.errno, error.strerror, error.filename)
    return ToldElsewhere(f"{type(error).__name__}: {error}")


def _anothers(error: Exception) -> Exception:
    return DiskElsewhere(*error.args) if isinstance(error, OSError) else ToldElsewhere(str(error))


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)  # pyright: ignore[reportArgumentType] (None raises what is caught)
    except (TypeError, ValueError):
        raise UserError(f"{name}: is {value!r} in the environment; start several processes with torchrun, which sets it") from None
