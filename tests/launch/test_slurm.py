"""launch/slurm.sbatch, in a small Slurm of two nodes that are both this machine: what is requeued, and that nothing is lost by it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from parallel_runs import launch

from fastllava.train.metrics.log import read_metrics
from fastllava.train.state import checkpoint

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
COMMANDS = Path(__file__).parent / "slurm"
FAILED, STOPPED = 1, 1
"""torchrun's exit codes when a process has failed, and when a signal has stopped it."""


@dataclass(frozen=True)
class Start:
    """How one start of a job ended."""

    code: int
    said: str
    queued_again: bool


@dataclass(frozen=True)
class Slurm:
    """Two nodes, and a folder from which jobs are submitted."""

    folder: Path
    job: int

    @property
    def state(self) -> Path:
        return self.folder / "slurm"

    def start(self, *words: str, near_limit: Callable[[], bool] = lambda: False, restarts: int = 0) -> Start:
        """Start the job and wait for its end; as soon as `near_limit`, its script gets the signal that it asks for."""
        environment = {
            **os.environ,
            "PATH": f"{COMMANDS}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.state),
            "SLURM_JOB_ID": str(self.job),
            "SLURM_JOB_NODELIST": "here[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        # Slurm runs a copy of the script, which lies elsewhere.
        copy = shutil.copyfile(SCRIPT, self.state / "slurm_script")
        with (self.state / "log").open("w") as log:
            script = subprocess.Popen(["bash", copy, *words], cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
            sent = False
            while script.poll() is None:
                if not sent and near_limit():
                    script.send_signal(signal.SIGUSR1)
                    sent = True
                time.sleep(0.02)
        queued_again = (self.state / "requeued").exists()
        (self.state / "requeued").unlink(missing_ok=True)
        return Start(script.returncode, (self.state / "log").read_text(), queued_again)


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    (tmp_path / "slurm").mkdir()
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'PATH="{tmp_path}/bin:{Path(sys.executable).parent}:$PATH"\n')
    (tmp_path / "bin").mkdir()
    # The script makes a port of the job's number.
    while True:
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        if 10000 <= port < 30000:
            return Slurm(tmp_path, 20000 + port - 10000)
        # The system gives ports from 32768 on.
        port = 10000 + port % 20000
        with socket.socket() as listener:
            if listener.connect_ex(("localhost", port)):
                return Slurm(tmp_path, 20000 + port - 10000)


def stand_in(slurm: Slurm, then: str) -> None:
    """A torchrun that writes what the run tells by `tell STATUS STEPS`, and does `then`; and a fastllava with a config of one key."""
    scripts = {
        "fastllava": f'[[ $1 == config && $2 == good.yaml ]] || exit 2\necho "output_dir: {slurm.folder}/run"',
        "torchrun": f"""
            tell() {{
                echo '{{"status": "'$1'", "steps": '$2'}}' > run/summary.$SLURM_NODEID
                mv run/summary.$SLURM_NODEID run/run_summary.json
            }}
            trap 'stopped' TERM
            echo "$@" > torchrun.$SLURM_NODEID
            {then}
            touch ready.$SLURM_NODEID
            for i in {{1..200}}; do sleep 0.05; done""",
    }
    for name, script in scripts.items():
        path = slurm.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)


ENDS = {
    # what the run does; whether the limit comes near; what the job's exit code is; whether it queues again
    "completes": ("tell complete 9; exit 0", False, 0, False),
    "fails": (f"tell failed 3; exit {FAILED}", False, FAILED, False),
    "fails after it was once stopped": (f"tell interrupted 3; exit {FAILED}", False, FAILED, False),
    "saves": (f"stopped() {{ tell interrupted 7; exit {STOPPED}; }}", True, 0, True),
    "is at its end as the limit comes": ("stopped() { tell complete 9; exit 0; }", True, 0, False),
    "dies before it begins": (f"stopped() {{ exit {STOPPED}; }}", True, STOPPED, False),
    "does not get to a step": (f"stopped() {{ tell interrupted 5; exit {STOPPED}; }}", True, STOPPED, False),
    "cannot save": (f"stopped() {{ tell failed 7; exit {FAILED}; }}", True, FAILED, False),
}


@pytest.mark.parametrize("name", ENDS)
def test_only_what_goes_on_is_queued_again(slurm, name):
    then, near, code, again = ENDS[name]
    stand_in(slurm, then)
    (slurm.folder / "run").mkdir()
    (slurm.folder / "run" / "run_summary.json").write_text('{"status": "interrupted", "steps": 5}')
    # A node that does not take the signal yet would die of it.
    ready = [slurm.folder / f"ready.{node}" for node in range(2)]
    start = slurm.start("good.yaml", "optim.lr=1", near_limit=lambda: near and all(node.exists() for node in ready))
    assert (start.code, start.queued_again) == (code, again), start.said
    assert (slurm.state / "scancelled").exists() == near
    assert ("not queued again" in start.said) == (near and code != 0)


def test_a_wrong_config_takes_no_node(slurm):
    stand_in(slurm, "exit 0")
    assert slurm.start("bad.yaml").code == 2
    assert slurm.start().code == 2
    assert not (slurm.folder / "torchrun.0").exists()


def test_every_node_runs_what_readme_runs(slurm, repo):
    stand_in(slurm, "exit 0")
    assert slurm.start("good.yaml", "data.images=a b").code == 0
    said = [(slurm.folder / f"torchrun.{node}").read_text() for node in range(2)]
    assert said[0] == said[1]
    readme = (repo / "README.md").read_text(encoding="utf-8")
    (options,) = set(re.findall(r"^torchrun (--no-python) --nproc-per-node \d (.*) fastllava train ", readme, re.MULTILINE))
    for words in (*options, "--nnodes 2 --nproc-per-node 1", "--rdzv-backend c10d --rdzv-endpoint localhost:"):
        assert words in said[0]
    assert said[0].endswith(" fastllava train good.yaml data.images=a b\n")


def test_the_signal_leaves_time_and_stops_are_not_cut_short():
    text = SCRIPT.read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, re.MULTILINE))
    assert options["signal"] == "B:USR1@600"
    assert "--shutdown-timeout 600" in text
    assert {"requeue": "", "open-mode": "append", "ntasks-per-node": "1"}.items() <= options.items()
    # What sbatch of Slurm 20.11 to 25.05 knows.
    known = {
        "job-name",
        "nodes",
        "ntasks-per-node",
        "gpus-per-node",
        "cpus-per-task",
        "mem",
        "time",
        "signal",
        "requeue",
        "open-mode",
        "output",
    }
    assert set(options) == known


@pytest.mark.parametrize("path", [SCRIPT, *sorted(COMMANDS.iterdir())], ids=lambda path: path.name)
def test_its_shell_is_in_order(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    if (checker := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("no shellcheck: pip install -e '.[dev]' brings it")
    assert subprocess.run([checker, path], capture_output=True, text=True).stdout == ""


@pytest.mark.exhaustive
@pytest.mark.parametrize("whole", [False, True], ids=["to the tasks", "to all processes"])
def test_stopped_by_the_limit_it_queues_again_and_ends_as_if_it_had_not_been(slurm, settings, world, tmp_path, whole):
    def values(name):
        changes = {
            "train": {"max_steps": 60, "checkpoint_minutes": None, "device": "cpu"},
            "data": {"prepared_dir": str(world / "prepared")},
        }
        return settings("finetune", output_dir=str(tmp_path / name), **changes)

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values("run")))
    if whole:
        # Where Slurm finds a job's processes otherwise than by cgroup, torchrun's hear the signal too.
        (slurm.state / "whole").touch()
    first = slurm.start("config.yaml", near_limit=lambda: len(read_metrics(tmp_path / "run")) >= 3)
    assert first.queued_again, first.said
    assert first.code == 0
    taken = checkpoint.newest(tmp_path / "run").step
    assert 3 <= taken < 60
    assert first.said.count(f"stopped by SIGTERM before step {taken} of 60; the same command goes on from there") == 1
    assert f"saved before step {taken}; the job queues again" in first.said
    if whole:
        return

    second = slurm.start("config.yaml", restarts=1)
    assert (second.code, second.queued_again) == (0, False), second.said
    assert f"resuming before step {taken}" in second.said

    launch(2, [(values("at once"), None)], tmp_path / "said")
    names = sorted(path.name for path in (tmp_path / "at once").glob("*.safetensors"))
    assert names
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes(), name
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("run", "at once")]
    assert losses[0] == losses[1]
