"""`fastllava bench kernels`: every implementation of every room and its peers, judged against fp64 truth, then timed.

A row is one JSON line: room, implementation, shape, dtype, pass, milliseconds (p20, p50, p80), peak bytes, share of the floor,
distances to truth, and the world it was measured in. What cannot run here, runs out of memory, breaks or is wrong has a row
too: `void` says why, and it has no time.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches.ceilings import Ceilings, measure
from benches.lib import judging
from benches.lib.results import CANNOT, OUT_OF_MEMORY, Row, Sheet, first_line
from benches.lib.timing import Call, interleaved, peak_bytes, quantiles
from benches.lib.trials import release
from benches.lib.world import check_device, world
from benches.peers.rooms import Bound, Peer, peers
from fastllava.errors import UserError
from fastllava_kernels import Room, rooms
from fastllava_kernels.room import REFERENCE
from fastllava_kernels.workload import Cost, Shape

PASSES = ("forward", "backward", "both")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TINY = "tiny"


@dataclass(frozen=True)
class Plan:
    """What to measure. `sizes`, `implementations`: names to keep, all when empty; a size is a shape's name or the part of it before "-"."""

    rooms: Mapping[str, Room]
    device: torch.device
    dtype: str
    sizes: Sequence[str] = ()
    implementations: Sequence[str] = ()
    passes: Sequence[str] = PASSES
    seconds: float = 0.5
    """The time to spend on a row."""

    def shapes(self, room: Room) -> dict[str, Shape]:
        """The shapes to measure of a room: on a GPU all but tiny, on a CPU tiny only; equal ones once."""
        chosen: dict[str, Shape] = {}
        for name, shape in room.workload.shapes.items():
            size = name.partition("-")[0]
            wanted = bool({name, size} & set(self.sizes)) if self.sizes else (size == TINY) == (self.device.type == "cpu")
            if wanted and shape not in chosen.values():
                chosen[name] = shape
        return chosen

    def candidates(self, room: Room) -> dict[str, Peer]:
        """What is to be timed of a room: implementations, then peers."""
        ours = {name: Peer(room.name, partial(_bind, each.function), each.unsupported) for name, each in room.implementations.items()}
        return {name: one for name, one in (ours | peers(room)).items() if not self.implementations or name in self.implementations}

    def check(self) -> None:
        """Raises UserError for a name that is nothing to measure."""
        kept = dataclasses.replace(self, implementations=())
        known = {
            "--sizes": {part for room in self.rooms.values() for name in room.workload.shapes for part in (name, name.partition("-")[0])},
            "--implementations": {name for room in self.rooms.values() for name in kept.candidates(room)},
            "--passes": set(PASSES),
            "--dtype": set(DTYPES),
        }
        given = {"--sizes": self.sizes, "--implementations": self.implementations, "--passes": self.passes, "--dtype": [self.dtype]}
        for option, names in given.items():
            for name in names:
                if name not in known[option]:
                    raise UserError(f"{option}: '{name}' is none of {', '.join(sorted(known[option]))}")
        check_device(self.device)


def rooms_named(names: Sequence[str]) -> dict[str, Room]:
    """The rooms with these names, in this order; every room for none. Raises UserError on a name that is none."""
    known = rooms()
    for name in names:
        if name not in known:
            raise UserError(f"bench kernels: '{name}' is no room; write one of {', '.join(known)}")
    return {name: known[name] for name in names or known}


def bench(plan: Plan, sheet: Sheet) -> list[Row]:
    """Measure everything in `plan`; the rows of a shape are appended together. Raises UserError on unknown names."""
    plan.check()
    device = world(plan.device)["device"]
    todo = [(room, shape) for room in plan.rooms.values() for shape in plan.shapes(room) if not _known(plan, room, shape, device, sheet)]
    if not todo:
        return sheet.rows
    ceilings = measure(plan.device, DTYPES[plan.dtype], plan.seconds)
    sheet.say(f"{device}: {ceilings.matmul_tflops:.3g} TFLOP/s in {plan.dtype}, {ceilings.copy_gbs:.4g} GB/s copied")
    for room, shape in todo:
        for row in list(measure_shape(plan, room, shape, ceilings)):
            sheet.add(row, in_words)
    return sheet.rows


def _known(plan: Plan, room: Room, shape: str, device: str, sheet: Sheet) -> bool:
    wanted = {"room": room.name, "shape": shape, "dtype": plan.dtype, "device": device}
    return all(sheet.has(implementation=name, **wanted) for name in plan.candidates(room))


def measure_shape(plan: Plan, room: Room, shape_name: str, ceilings: Ceilings) -> Iterator[Row]:
    """The rows of one shape: all candidates take turns."""
    dtype, shape = DTYPES[plan.dtype], room.workload.shapes[shape_name]
    # Each shape gets a graph of its own, not one for all; and 8 of them are the most before PyTorch stops compiling.
    torch.compiler.reset()
    candidates = plan.candidates(room)
    args = room.workload.inputs(shape, dtype, plan.device, 0)
    passes = [name for name in plan.passes if name == "forward" or judging.leaves(args)]
    trials = _try_all(plan, room, candidates, args, passes)
    for name in passes:
        cost = cost_of(room, shape, dtype, name)
        floor = ceilings.floor_ms(cost)
        timed = {candidate: trial.calls[name] for candidate, trial in trials.items() if trial.void[name] is None}
        times = interleaved(timed, plan.device, plan.seconds)
        for candidate, trial in trials.items():
            taken = times.get(candidate)
            yield {
                "room": room.name,
                "implementation": candidate,
                "shape": shape_name,
                "dtype": plan.dtype,
                "pass": name,
                **quantiles("ms", taken),
                "host_us": taken and taken.host_us,
                "host_bound": taken and taken.host_bound,
                "peak_bytes": trial.peaks.get(name) if taken else None,
                "floor_share": taken and floor / taken.p50,
                "error": trial.errors[name][0],
                "reference_error": trial.errors[name][1],
                "void": trial.void[name],
                "peer": candidate not in room.implementations,
                "floor_ms": floor,
                "flops": cost.flops,
                "bytes": cost.bytes,
                "matmul_ceiling_tflops": ceilings.matmul_tflops,
                "copy_ceiling_gbs": ceilings.copy_gbs,
            } | world(plan.device)
    del args, trials
    release(plan.device)


def cost_of(room: Room, shape: Shape, dtype: torch.dtype, name: str) -> Cost:
    """The least work of a pass; "both" is the sum."""
    parts = [room.workload.cost(shape, dtype, part) for part in ("forward", "backward") if name in (part, "both")]
    return Cost(sum(part.flops for part in parts), sum(part.bytes for part in parts))


def in_words(row: Row) -> str:
    """Time, distance to the floor, memory; the host's time where it launches for a GPU."""
    host = "" if row["host_us"] is None else f", {row['host_us']:.0f} us of the host{', which the GPU waited for' * row['host_bound']}"
    return f"{row['ms_p50']:.4g} ms{host}, {row['floor_share']:.0%} of the floor's speed, {row['peak_bytes'] / 2**20:.4g} MiB"


@dataclass
class _Trial:
    """What is known of a candidate before it is timed, by pass."""

    calls: dict[str, Call]
    void: dict[str, str | None]
    errors: dict[str, tuple[float | None, float | None]]
    peaks: dict[str, int]

    @staticmethod
    def failed(passes: Sequence[str], reason: str) -> "_Trial":
        return _Trial({}, dict.fromkeys(passes, reason), dict.fromkeys(passes, (None, None)), {})


@dataclass(frozen=True)
class _Truth:
    results: judging.Results
    upstream: list[Tensor]
    reference: judging.Results

    def distances(self, got: judging.Results) -> dict[str, list[float]]:
        """The distances by pass."""
        forward = judging.distances(got.outputs, self.results.outputs)
        backward = judging.distances(got.gradients, self.results.gradients)
        return {"forward": forward, "backward": backward, "both": forward + backward}


def _bind(function: Callable[..., Any], args: tuple[Any, ...]) -> Bound:
    return Bound(lambda: function(*args), judging.leaves(args))


def _try_all(plan: Plan, room: Room, candidates: Mapping[str, Peer], args: tuple[Any, ...], passes: Sequence[str]) -> dict[str, _Trial]:
    """Build, judge and weigh every candidate; truth is gone when they are timed."""
    dtype = DTYPES[plan.dtype]
    able = {name: one.unsupported(plan.device, dtype) for name, one in candidates.items()}
    trials = {name: _Trial.failed(passes, CANNOT + reason) for name, reason in able.items() if reason is not None}
    try:
        truth = _truth(room, args)
    except torch.OutOfMemoryError:
        release(plan.device)
        trials = {name: _Trial.failed(passes, f"{OUT_OF_MEMORY} computing fp64 truth") for name in able} | trials
        return {name: trials[name] for name in candidates}
    for name, reason in able.items():
        if reason is None:
            try:
                trials[name] = _try(candidates[name], args, truth, passes, room.slack[dtype], plan.device)
            except torch.OutOfMemoryError:
                trials[name] = _Trial.failed(passes, OUT_OF_MEMORY)
            except Exception as error:
                trials[name] = _Trial.failed(passes, f"broke: {type(error).__name__}: {first_line(error)}")
            release(plan.device)
    return {name: trials[name] for name in candidates}


def _truth(room: Room, args: tuple[Any, ...]) -> _Truth:
    """The reference in fp64 (tests show that it equals the op written out row by row), and in the dtype, on the same numbers."""
    function = room.implementations[REFERENCE].function
    bound = _bind(function, args)
    upstream = judging.cotangents(judging.as_list(bound.function()))
    reference = judging.run(bound.function, bound.leaves, upstream)
    exact = _bind(function, judging.in_fp64(args))
    return _Truth(judging.run(exact.function, exact.leaves, upstream), upstream, reference)


def _try(candidate: Peer, args: tuple[Any, ...], truth: _Truth, passes: Sequence[str], slack: float, device: torch.device) -> _Trial:
    bound = candidate.build(args)
    # What a lower bound gives is not the op's: it has outputs, and so cotangents, of its own.
    upstream = judging.cotangents(judging.as_list(bound.function())) if bound.bound_only else truth.upstream
    got = judging.run(bound.function, bound.leaves, upstream)
    trial = _Trial(_calls(bound, upstream), dict.fromkeys(passes, None), dict.fromkeys(passes, (None, None)), {})
    if not bound.bound_only:
        mine, reference = truth.distances(got), truth.distances(truth.reference)
        for name in passes:
            verdict = judging.judge(mine[name], reference[name], slack)
            errors = [error if error < float("inf") else None for error in (verdict.error, verdict.reference_error)]
            trial.errors[name] = errors[0], errors[1]
            if not verdict.allowed:
                trial.void[name] = (
                    f"wrong: {verdict.error:.2g} from fp64 truth; allowed are the reference's {verdict.reference_error:.2g} and {slack:g}"
                )
    del got
    for name in passes:
        if trial.void[name] is None:
            trial.peaks[name] = peak_bytes(trial.calls[name], device)
    return trial


def _calls(bound: Bound, upstream: Sequence[Tensor]) -> dict[str, Call]:
    """The timed call of each pass. Forward saves for a backward pass, as in training."""

    def forward(_: Any = None) -> list[Tensor]:
        return judging.as_list(bound.function())

    def backward(outputs: list[Tensor]) -> Any:
        return torch.autograd.grad(outputs, bound.leaves, upstream, allow_unused=True)

    return {"forward": Call(forward), "backward": Call(backward, forward), "both": Call(lambda _: backward(forward()))}
