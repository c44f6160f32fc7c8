"""Both stages against the original's own training runs, through the public command, packed in several ways, in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from golden_trace import RUNS, check_equal, config_of
from parallel_runs import launch

from fastllava.config import check_config
from fastllava.train import run


@pytest.mark.parametrize("name", RUNS)
def test_through_the_command(name, each_golden, tmp_path):
    config = config_of(name, each_golden, tmp_path / name)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).with_name("fastllava"), "train", path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr
    check_equal(name, each_golden, tmp_path / name)


OTHERWISE = {
    "pretrain": {"recompute": "selective"},
    "finetune": {"recompute": "norms", "last_layer": "all"},
    "lora": {"recompute": "full", "last_layer": "all"},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_sample_a_micro_batch_computed_otherwise(name, golden, tmp_path):
    run(check_config(config_of(name, golden, tmp_path / name, micro_batch_tokens=1, **OTHERWISE[name])))
    check_equal(name, golden, tmp_path / name)


PARALLEL = {
    "pretrain": {"frozen": "shard"},
    "finetune": {},
    "finetune_accum": {"reshard": False, "reduce": "step"},
    "lora": {"frozen": "shard"},
}


@pytest.mark.parametrize("name", RUNS)
def test_in_two_processes_with_recompute(name, golden, tmp_path):
    config = config_of(name, golden, tmp_path / name, micro_batch_tokens=700, recompute="full", device="cpu")
    launch(2, [({**config, "parallel": PARALLEL[name]}, None)], tmp_path / "said")
    # The recorded norms are fp32 sums over whole tensors on a CPU, up to 2e-4 off the true ones; sums over shards are less so.
    check_equal(name, golden, tmp_path / name, norm_tolerance=2e-4)
