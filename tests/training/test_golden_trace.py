"""Both stages against the original's own training runs, through the public command, packed in several ways."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from golden_trace import RUNS, check_equal, config_of

from fastllava.config import check_config
from fastllava.train import run


@pytest.mark.parametrize("name", RUNS)
def test_through_the_command(name, shared, tmp_path):
    config = config_of(name, shared, tmp_path / name)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).with_name("fastllava"), "train", path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr
    check_equal(name, shared, tmp_path / name)


@pytest.mark.parametrize(("budget", "recompute"), [(1, "none"), (700, "full")])
@pytest.mark.parametrize("name", RUNS)
def test_packed_with_several_token_budgets(name, budget, recompute, shared, tmp_path):
    run(check_config(config_of(name, shared, tmp_path / name, micro_batch_tokens=budget, recompute=recompute)))
    check_equal(name, shared, tmp_path / name)
