"""The configuration of a run: `load_config` reads it, `Config` holds it."""

from fastllava.config.keys import (
    LEVER,
    PROJECTORS,
    STAGE_DEFAULTS,
    Compile,
    Config,
    DataConfig,
    Fp8,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Quantize,
    Recompute,
    Rows,
    Stage,
    TrainConfig,
    key_names,
    marked,
    projector_name,
    same_training,
    value_of,
    without_levers,
)
from fastllava.config.load import as_written, check_config, load_config
from fastllava.config.lora import TARGETS, LoraConfig, Target
