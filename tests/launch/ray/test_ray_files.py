"""The cluster files of launch/ray stand before Ray's and the providers' own descriptions; broken ones are refused."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.ray.ray_files import Config, problems

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "launch/ray"
FILES = sorted(FOLDER.glob("*.yaml"))
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
GONE = object()


@dataclass(frozen=True)
class Swap:
    """A part of a command, and what to put in its place."""

    old: str
    new: str


def read(name: str) -> Config:
    config: Config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return config


def edit(config: Any, path: str, value: Any) -> None:
    """Sets, removes or changes what a path leads to; numbers are places in a list."""
    *parents, last = [int(name) if re.fullmatch(r"-?\d+", name) else name for name in split(path)]
    for name in parents:
        config = config[name]
    if value is GONE:
        del config[last]
    elif isinstance(value, Swap):
        assert value.old in config[last], "the test edits what is there"
        config[last] = config[last].replace(value.old, value.new)
    else:
        config[last] = value


def split(path: str) -> list[str]:
    """At dots, but for those in a file's name."""
    section, _, name = path.partition(".")
    return [section, name] if section == "file_mounts" else path.split(".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_cluster_file_is_accepted(path: Path) -> None:
    assert problems(read(path.stem)) == []


WORKER = "available_node_types.gpu_worker.node_config"
HEAD_START, WORKER_START = "head_start_ray_commands.-1", "worker_start_ray_commands.-1"
PODS = "spec.workerGroupSpecs.0"
CARDS = f"{WORKER}.NetworkInterfaces"
BROKEN: list[tuple[str, str, str, Any]] = [
    ("aws", "ray: .*hed_node_type", "hed_node_type", "head"),
    ("aws", "ray: .*'two' is not of type", "max_workers", "two"),
    ("aws", "InstanceType: 'p4de.24xlrge' is not one of", f"{WORKER}.InstanceType", "p4de.24xlrge"),
    ("aws", "gpu_worker.: .*'InstanceTyp' was unexpected", f"{WORKER}.InstanceTyp", "p4de.24xlarge"),
    ("aws", "NetworkInterfaces.1: .*'SubnetID' was unexpected", f"{CARDS}.1.SubnetID", "subnet-0"),
    ("aws", r"NetworkInterfaces\[2\] needs SubnetId", f"{CARDS}.2.SubnetId", GONE),
    ("aws", "no public address", f"{CARDS}.0.AssociatePublicIpAddress", True),
    ("aws", "excludes SubnetIds", f"{WORKER}.SubnetIds", ["subnet-0"]),
    ("aws", "one availability zone", "provider.availability_zone", "us-west-2a,us-west-2b"),
    ("aws", "said to have GPUs", "available_node_types.head.resources.GPU", 1),
    ("aws", "get no token", "file_mounts.~/.ray/auth_token", GONE),
    ("gcp", "gpu_worker.: .*'machinetype' was unexpected", f"{WORKER}.machinetype", "a2-ultragpu-8g"),
    ("gcp", "nicType: 'GNIC' is not one of", f"{WORKER}.networkInterfaces.0.nicType", "GNIC"),
    ("gcp", "acceleratorCount: 'eight'", f"{WORKER}.guestAccelerators.0.acceleratorCount", "eight"),
    ("gcp", "onHostMaintenance: 'STOP' is not one of", f"{WORKER}.scheduling.onHostMaintenance", "STOP"),
    ("own-machines", "ray: ", "provider.head_ip", GONE),
    ("own-machines", "not the number of worker_ips", "min_workers", 1),
    ("own-machines", "RAY_enable_autoscaler_v2=0", HEAD_START, Swap("RAY_enable_autoscaler_v2=0", "")),
    ("own-machines", "dashboard is not on loopback", HEAD_START, Swap("127.0.0.1", "0.0.0.0")),
    ("own-machines", "may get ranks", HEAD_START, Swap("--num-gpus=0", "")),
    ("own-machines", "starts no workers", HEAD_START, Swap("--autoscaling-config", "--config")),
    ("own-machines", "head does not source node.sh", HEAD_START, Swap("node.sh own &&", "node.sh own;")),
    ("own-machines", "worker does not source node.sh", WORKER_START, Swap("node.sh own", "node.sh aws")),
    ("own-machines", "not find the head", WORKER_START, Swap("$RAY_HEAD_IP", "10.0.0.1")),
    ("own-machines", "not pinned", "setup_commands.-1", "pip install tp-decoders"),
    ("kuberay", "'minReplica' was unexpected", f"{PODS}.minReplica", 1),
    ("kuberay", "0 is not of type 'string'", "spec.headGroupSpec.rayStartParams.num-gpus", 0),
    ("kuberay", "outside minReplicas", f"{PODS}.replicas", 3),
    ("kuberay", "ray-worker asks for no token", f"{PODS}.template.spec.containers.0.env.2", GONE),
    ("kuberay", "ray-head has no interface", "spec.headGroupSpec.template.spec.containers.0.env.0", GONE),
    ("kuberay", "mounts .'shm'., which the pod has not", f"{PODS}.template.spec.volumes.1", GONE),
    ("kuberay", "dashboard is not on loopback", "spec.headGroupSpec.rayStartParams.dashboard-host", "0.0.0.0"),
]


@pytest.mark.parametrize(
    ("name", "rule", "path", "value"), BROKEN, ids=[f"{name}-{rule[:30]}" for name, rule, _, _ in BROKEN]
)
def test_a_broken_file_is_refused_for_what_is_broken(name: str, rule: str, path: str, value: Any) -> None:
    config = copy.deepcopy(read(name))  # where the file says a thing twice by an anchor, one is edited
    edit(config, path, value)
    found = problems(config)
    assert any(re.search(rule, problem) for problem in found), found


@pytest.mark.parametrize("name", ["aws", "gcp", "own-machines"])
def test_every_mounted_path_is_in_the_repository(name: str) -> None:
    mounts = read(name)["file_mounts"]
    for remote, local in mounts.items():
        if local != "~/.ray/auth_token":
            assert (ROOT / local).exists() and remote == f"~/tp-decoders/{local}"


def test_what_the_installation_needs_is_mounted() -> None:
    for name in ("aws", "gcp", "own-machines"):
        packages = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
        assert packages is not None
        wanted = {*re.findall(r'"(\w+)"', packages[1]), "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
        assert wanted <= set(read(name)["file_mounts"].values())


def test_the_manifest_runs_the_pinned_ray() -> None:
    assert read("kuberay")["spec"]["rayVersion"] == PINS["ray"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_how_to_start_and_to_serve(path: Path) -> None:
    opening = path.read_text(encoding="utf-8").split("\n\n")[0][:2000]
    assert "tp-decoders serve --model" in opening and re.search(r"ray up -y launch/ray/|kubectl apply", opening)


def environment() -> set[str]:
    pod = read("kuberay")["spec"]["headGroupSpec"]["template"]["spec"]
    return {entry["name"] for entry in pod["containers"][0]["env"]}


def test_every_variable_of_node_sh_that_ray_reads_is_in_the_manifest_too() -> None:
    script = (FOLDER / "node.sh").read_text(encoding="utf-8")
    assert set(re.findall(r"\b(RAY_\w+|TORCH_\w+)=", script)) <= environment()
