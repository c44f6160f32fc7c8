"""The training of one stage: `run` does all of it, `train_step` is one optimizer step."""

from fastllava.train.loop import RunResult, Trainer, run
from fastllava.train.step import train_step
