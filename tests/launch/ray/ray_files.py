"""What is wrong with a cluster file of launch/ray, found without a network: `problems(config)`.

Ray's own schema and its translation of a RayCluster, the providers' descriptions of a machine (provider_models), and
the rules of this project: a token for everybody, the dashboard on loopback, no rank on the head, pinned versions, and
the settings of the network from one place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.launch.ray.provider_models import EC2, GCP

Config = dict[str, Any]


def problems(config: Config) -> list[str]:
    """One line each; empty where all is well."""
    if config.get("kind") == "RayCluster":
        return [*_by_schema(config, RAYCLUSTER, "manifest"), *_kuberay(config), *_kuberay_rules(config)]
    refused = _by_ray(config)
    if refused:
        return refused
    checks = {"aws": _aws, "gcp": _gcp, "local": _local}
    return [*checks[config["provider"]["type"]](config), *_rules(config)]


def _by_ray(config: Config) -> list[str]:
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:
        return [f"ray: {str(getattr(error, 'message', error)).splitlines()[0] if str(error) else type(error).__name__}"]
    return []


def _by_schema(value: Any, schema: dict[str, Any], what: str) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{what}.{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]


def _aws(config: Config) -> Iterator[str]:
    schema = json.loads(EC2.read_text(encoding="utf-8"))
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}
        yield from _by_schema(node, schema, name)
        interfaces = node.get("NetworkInterfaces", [])
        if interfaces and ("SubnetIds" in node or "SecurityGroupIds" in node):
            yield f"{name}: NetworkInterfaces excludes SubnetIds and SecurityGroupIds"
        for index, interface in enumerate(interfaces):
            if not (interface.get("SubnetId") and interface.get("Groups")):
                yield f"{name}: NetworkInterfaces[{index}] needs SubnetId and Groups"
        if len(interfaces) > 1 and any(interface.get("AssociatePublicIpAddress") for interface in interfaces):
            yield f"{name}: an instance with several interfaces gets no public address"
    if "," in config["provider"].get("availability_zone", ""):
        yield "a placement group is in one availability zone"


def _gcp(config: Config) -> Iterator[str]:
    schema = json.loads(GCP.read_text(encoding="utf-8"))
    for name, kind in config["available_node_types"].items():
        yield from _by_schema(kind["node_config"], schema, name)


def _local(config: Config) -> Iterator[str]:
    if config["min_workers"] != len(config["provider"]["worker_ips"]):
        yield "min_workers is not the number of worker_ips: some would stay idle"
    if "RAY_enable_autoscaler_v2=0" not in config["head_start_ray_commands"][-1]:
        yield "the head needs RAY_enable_autoscaler_v2=0: otherwise one worker is not started"


def _rules(config: Config) -> Iterator[str]:
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    for name, command in (("head", head), ("worker", worker)):
        if f"launch/ray/node.sh {NETWORK[config['provider']['type']]} && " not in command:
            yield f"the {name} does not source node.sh: no token is asked for, and no interface is chosen"
    if "--dashboard-host=127.0.0.1" not in head:
        yield "the dashboard is not on loopback"
    if "--num-gpus=0" not in head:
        yield "the head may get ranks"
    if "--autoscaling-config=~/ray_bootstrap_config.yaml" not in head:
        yield "the head starts no workers without --autoscaling-config"
    if "$RAY_HEAD_IP" not in worker:
        yield "the workers do not find the head"
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        yield "the nodes get no token"
    if not any("launch/ray/install.sh" in command for command in config["setup_commands"]):
        yield "the versions are not pinned: install.sh is not run"
    if config["provider"]["type"] != "local" and config["available_node_types"]["head"]["resources"]["GPU"] != 0:
        yield "the head is said to have GPUs"


def _kuberay(config: Config) -> list[str]:
    try:
        cluster = copy.deepcopy(config)
        cluster["metadata"]["namespace"] = "default"
        validate_config(_derive_autoscaling_config_from_ray_cr(cluster))
    except Exception as error:
        return [f"ray: {type(error).__name__}: {error}"]
    return []


def _kuberay_rules(config: Config) -> Iterator[str]:
    spec = config["spec"]
    head = spec["headGroupSpec"]
    if head["rayStartParams"].get("dashboard-host") != "127.0.0.1":
        yield "the dashboard is not on loopback"
    if head["rayStartParams"].get("num-gpus") != "0":
        yield "the head may get ranks"
    for group in (head, *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            given = {entry["name"]: entry for entry in container["env"]}
            mode, token = given.get("RAY_AUTH_MODE", {}), given.get("RAY_AUTH_TOKEN", {})
            if mode.get("value") != "token" or "valueFrom" not in token:
                yield f"{container['name']} asks for no token"
            if "NCCL_SOCKET_IFNAME" not in given:
                yield f"{container['name']} has no interface"
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            if missing := mounted - {volume["name"] for volume in pod["volumes"]}:
                yield f"{container['name']} mounts {sorted(missing)}, which the pod has not"
    for group in spec["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas is outside minReplicas to maxReplicas"


NETWORK = {"aws": "aws", "gcp": "gcp", "local": "own"}

TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}


def _object(required: str, **members: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": members, "additionalProperties": False, "required": required.split()}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


_SECRET = _object("secretKeyRef", secretKeyRef=_object("name key", name=TEXT, key=TEXT))
_ENV = _object("name", name=TEXT, value=TEXT, valueFrom=_SECRET)
_CONTAINER = _object(
    "name image env resources volumeMounts",
    name=TEXT,
    image=TEXT,
    env=_list(_ENV),
    ports=_list(_object("containerPort", containerPort=COUNT, name=TEXT)),
    resources=_object("limits requests", limits=TEXTS, requests=TEXTS),
    securityContext=_object("capabilities", capabilities=_object("add", add=_list(TEXT))),
    volumeMounts=_list(_object("name mountPath", name=TEXT, mountPath=TEXT)),
)
_VOLUME = _object(
    "name",
    name=TEXT,
    persistentVolumeClaim=_object("claimName", claimName=TEXT),
    emptyDir=_object("medium", medium={"enum": ["Memory"]}, sizeLimit=TEXT),
)
_POD = _object(
    "containers", containers=_list(_CONTAINER), volumes=_list(_VOLUME), automountServiceAccountToken={"type": "boolean"}
)
_TEMPLATE = _object("spec", spec=_POD)
_GROUP = _object(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    template=_TEMPLATE,
)
RAYCLUSTER = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=_object("name", name=TEXT),
    spec=_object(
        "rayVersion headGroupSpec workerGroupSpecs",
        rayVersion=TEXT,
        enableInTreeAutoscaling={"type": "boolean"},
        headGroupSpec=_object("rayStartParams template", rayStartParams=TEXTS, template=_TEMPLATE),
        workerGroupSpecs=_list(_GROUP),
    ),
)
"""The part of the custom resource that the manifest uses; Kubernetes itself would drop a misspelt field in silence."""
