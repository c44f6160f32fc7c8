"""The checkpoints of a run while it goes: when one is due, and which was the last."""

import time

from fastllava.train import memory
from fastllava.train.setup import Setup
from fastllava.train.state import checkpoint
from fastllava.train.watch.standstill import Phase


class Saver:
    """Writes checkpoints of what `setup` trains, on all processes together."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._config = setup, setup.context.config
        self._saved_step = setup.first_step
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint of the state before `step`, by this process's clock."""
        train = self._config.train
        by_step = train.checkpoint_steps is not None and step % train.checkpoint_steps == 0
        by_time = train.checkpoint_minutes is not None and time.monotonic() - self._saved_at >= 60 * train.checkpoint_minutes
        return (by_step or by_time) and step < self._setup.data.plan.n_steps

    def save(self, step: int) -> bool:
        """Write a checkpoint of the state before `step`; False when the disk takes none, which is said and never stops the training.

        Nothing is written for the step that the run began with here: that state is kept already, or is the beginning.
        """
        if step == self._saved_step:
            return True
        setup, out, held, data = self._setup, self._config.output_dir, self._setup.held, self._setup.data
        group, say = setup.context.group, setup.context.say
        self._saved_at = time.monotonic()
        setup.context.watch.now(Phase.WRITING)
        with memory.while_writing(self._config):
            try:
                state, left_out = (data.prepared.digest, setup.trained, setup.optimizer, group), data.plan.left_out
                folder = checkpoint.save(out, step, self._config, *state, run=held.run, start=held.start, set_aside=left_out)
                damaged = held.checkpoint.passed_over if held.checkpoint else ()
                with group.together():
                    if group.first:
                        checkpoint.keep_last(out, self._config.train.keep_checkpoints, folder, damaged)
            except OSError as error:
                say(f"checkpoint before step {step} could not be written ({error}); older ones are untouched, training goes on")
                return False
        self._saved_step = step
        say(f"wrote {folder}")
        return True

    def goes_on(self) -> str:
        """Where the same command begins, as far as checkpoints have been written."""
        return f"the same command goes on from checkpoint-{self._saved_step}" if self._saved_step else "the same command begins at step 0"
