"""launch/skypilot.yaml and launch/trainjob.yaml: their fields are those that the tools take, and they start what the README starts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from fastllava.config import load_config
from fastllava.train.metrics.log import read_metrics
from fastllava.train.state import checkpoint

LAUNCH = Path(__file__).parents[2] / "launch"
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
RUNTIME, TRAINJOB = yaml.safe_load_all((LAUNCH / "trainjob.yaml").read_text(encoding="utf-8"))
POD = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.fixture
def readme_options(repo) -> list[str]:
    """The options of the README's torchrun, without the number of processes."""
    text = (repo / "README.md").read_text(encoding="utf-8")
    (found,) = set(re.findall(r"^torchrun (--no-python) --nproc-per-node \d (.*) fastllava train ", text, re.MULTILINE))
    return list(found)


def test_skypilot_fields():
    # By sky/utils/schemas.py of SkyPilot 0.14, which refuses others.
    assert set(SKYPILOT) <= {"name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "volumes", "setup", "run"}
    assert set(SKYPILOT["resources"]) <= {"accelerators", "use_spot", "disk_size", "job_recovery"}
    assert SKYPILOT["resources"]["job_recovery"] == {"max_restarts_on_errors": 0}
    assert type(SKYPILOT["num_nodes"]) is type(SKYPILOT["resources"]["disk_size"]) is int
    for mount in SKYPILOT["file_mounts"].values():
        assert set(mount) <= {"name", "source", "store", "mode"}
        assert mount["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")
    assert all(type(value) is str for value in SKYPILOT["envs"].values())


def test_skypilot_runs_what_readme_runs_where_its_paths_lead(tmp_path, repo, readme_options):
    programs = tmp_path / "sky_workdir" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    (programs / "torchrun").write_text('#!/bin/bash\npwd\necho "$@"\n')
    (programs / "torchrun").chmod(0o755)
    cluster = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"}
    environment = {**os.environ, **cluster, **SKYPILOT["envs"], "HOME": str(tmp_path)}
    for _ in range(2):  # the second time as after a recovery on the same disk
        done = subprocess.run(["bash", "-euc", SKYPILOT["run"]], env=environment, capture_output=True, text=True)
        assert done.stderr == ""
        folder, said = done.stdout.splitlines()
    assert folder == str(tmp_path / "llava")
    for words in (*readme_options, "--nnodes 2 --nproc-per-node 8", "--rdzv-endpoint 10.0.0.7:29500"):
        assert words in said
    config = SKYPILOT["envs"]["CONFIG"]
    assert said.endswith(f" fastllava train {tmp_path}/sky_workdir/{config} data.prepared_dir=runs/prepared")
    # What the config names lies in a mount; what the run leaves, in the one that takes changes.
    loaded = load_config(repo / config)
    leads = {link.name: link.readlink() for link in (tmp_path / "llava").iterdir()}
    for path in (loaded.model.llm, loaded.model.vision_tower, loaded.data.records, loaded.data.images):
        assert leads[path.parts[0]] == Path("/models-and-data") / path.parts[0]
    assert leads[loaded.output_dir.parts[0]] == Path("/runs")
    assert {"/models-and-data", "/runs"} == set(SKYPILOT["file_mounts"])
    assert SKYPILOT["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"


def test_trainjob_fields():
    assert {one["apiVersion"] for one in (RUNTIME, TRAINJOB)} == {"trainer.kubeflow.org/v1alpha1"}
    assert (RUNTIME["kind"], TRAINJOB["kind"]) == ("TrainingRuntime", "TrainJob")
    assert TRAINJOB["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": RUNTIME["metadata"]["name"]}
    (replicated,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    # By these names the Trainer finds what it fills in.
    assert replicated["name"] == POD["containers"][0]["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert RUNTIME["spec"]["mlPolicy"]["numNodes"] == TRAINJOB["spec"]["trainer"]["numNodes"]
    assert {one["name"] for one in POD["containers"][0]["volumeMounts"]} == {one["name"] for one in POD["volumes"]}


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_trainjob_is_what_the_trainer_s_own_types_take(kind):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="no kubeflow-trainer-api: pip install -e '.[dev]' brings it")
    written = {"TrainingRuntime": RUNTIME, "TrainJob": TRAINJOB}[kind]
    # They drop what they do not know, so what they give back tells it.
    assert getattr(models, f"TrainerV1alpha1{kind}").from_dict(written).to_dict() == written


def test_trainjob_runs_what_readme_runs_and_leaves_time_to_save(readme_options):
    trainer = TRAINJOB["spec"]["trainer"]
    words = " ".join([*trainer["command"], *trainer["args"]])
    assert all(option in words for option in readme_options)
    options = get_args_parser().parse_args([*trainer["command"][1:], "fastllava"])
    assert options.nproc_per_node == str(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"])
    assert POD["terminationGracePeriodSeconds"] > options.shutdown_timeout
    assert trainer["args"][:2] == ["fastllava", "train"]
    load_config(trainer["args"][2], trainer["args"][3:])
    assert POD["restartPolicy"] == "Never"
    assert RUNTIME["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.exhaustive
def test_a_pod_that_is_moved_loses_no_step(settings, world, tmp_path):
    data = {"prepared_dir": str(world / "prepared")}
    values = settings("finetune", train={"max_steps": 60, "checkpoint_minutes": None, "device": "cpu"}, data=data)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [word if word != "8" else "1" for word in TRAINJOB["spec"]["trainer"]["command"]]

    def start(number):
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        pods = []
        for rank in range(2):
            # What the Trainer sets, by its KEP-2170.
            told = {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            environment = {**os.environ, **{f"PET_{name}": value for name, value in told.items()}}
            environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
            with (tmp_path / f"log.{number}.{rank}").open("w") as log:
                words = [*command, "fastllava", "train", "config.yaml"]
                pods.append(subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT))
        return pods

    first = start(0)
    while len(read_metrics(tmp_path / "run")) < 3:
        assert first[0].poll() is None, (tmp_path / "log.0.0").read_text()
        time.sleep(0.02)
    first[1].send_signal(signal.SIGTERM)
    assert [pod.wait(120) for pod in first] == [1, 1]
    taken = checkpoint.newest(tmp_path / "run").step
    assert f"stopped by SIGTERM before step {taken} of 60" in (tmp_path / "log.0.0").read_text()
    assert [pod.wait(240) for pod in start(1)] == [0, 0]
    assert f"resuming before step {taken}" in (tmp_path / "log.1.0").read_text()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(60))
