"""A Ray cluster of several raylets on this machine, and a port for the server on it."""

from __future__ import annotations

import socket

from ray.cluster_utils import Cluster

from tests.chaos.hosts import CHECKS, CORES, STORE_BYTES


def started(attempts: int = 3) -> Cluster:
    """A head. Ray gives its own start half a minute, which a busy machine does not always keep to."""
    size = {"num_cpus": CORES, "object_store_memory": STORE_BYTES}
    head = {"include_dashboard": False, "_system_config": CHECKS, **size}
    for left in reversed(range(attempts)):
        try:
            return Cluster(initialize_head=True, head_node_args=head)
        except Exception as error:
            if "timed out during startup" not in str(error) or not left:
                raise
    raise AssertionError("the last attempt returns or raises")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
