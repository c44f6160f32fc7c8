"""What a run leaves when it ends: the stage's files, the summary, the plot of the loss, and what is said of them."""

import time
from typing import Any

from fastllava.config import as_written
from fastllava.distributed.processes import collective
from fastllava.errors import UserError
from fastllava.train import memory
from fastllava.train.metrics.summary import LOSS_PLOT, describe_result, figures_in_words, plot_loss, write_summary
from fastllava.train.setup import Setup
from fastllava.train.stages import gather_result, write_result
from fastllava.train.state import checkpoint


def leave_result(setup: Setup, steps: int, goes_on: str) -> dict[str, Any]:
    """Write the result of a run that has taken all its `steps`, on all processes together; its summary.

    Raises UserError when output_dir does not take it; `goes_on` says where the same command begins then.
    """
    config, group, say = setup.context.config, setup.context.group, setup.context.say
    model, out = setup.model, config.output_dir
    with collective(), memory.while_writing(config):
        state = gather_result(model, config, group.first) if group.world > 1 else None
    try:
        left = group.on_first(lambda: write_result(model, config, state, say))
        summary = group.on_first(lambda: summarize(setup, "complete", steps, result=describe_result(out, left)))
    except OSError as error:
        mend = f"output_dir: {out} did not take the result ({error}); free space and start the same command again; {goes_on}"
        with group.first_speaks():
            raise UserError(mend) from None
    if config.train.checkpoint_steps is config.train.checkpoint_minutes is None:
        # Not wanted, and the result is whole.
        with group.together():
            if group.first:
                checkpoint.remove(out / f"checkpoint-{steps}")
    without = f", without {summary['set_aside']:,} samples set aside" if summary["set_aside"] else ""
    say(f"complete: {figures_in_words(summary)}{without}")
    for path in left if config.stage == "pretrain" else [out]:
        say(f"left {path}")
    plot(setup)
    return summary


def summarize(setup: Setup, status: str, steps: int, **more: Any) -> dict[str, Any]:
    """Write the summary of a run that has taken `steps`, with `more` facts; on the first process."""
    data, held, context = setup.data, setup.held, setup.context
    facts = {
        "config": as_written(context.config),
        "run": held.run,
        "start": held.start,
        "prepared_digest": data.prepared.digest,
        "prepared": str(data.prepared.folder),
        "records": data.plan.n_samples,
        "held_out": 0 if data.held_out is None else len(data.held_out.samples),
        "quarantined": data.prepared.manifest["quarantined"],
        "set_aside": len(data.plan.left_out),
        "kernels": setup.model.kernels(),
        "planned_steps": data.plan.n_steps,
        "processes": context.group.world,
        "notes": list(held.notes),
        **more,
    }
    counts, seconds = setup.throughput.counts(steps), time.monotonic() - context.began
    return write_summary(context.config.output_dir, status, facts, steps, counts, setup.first_step, seconds)


def plot(setup: Setup) -> None:
    """Draw the loss; the last thing of all, as the least: what a plotting library raises is said."""
    config, group = setup.context.config, setup.context.group
    with group.together():
        if group.first:
            try:
                plot_loss(config.output_dir, f"{config.stage}: {config.output_dir}")
            except Exception as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                setup.context.say(f"{LOSS_PLOT} could not be drawn ({why}); all else is there")
