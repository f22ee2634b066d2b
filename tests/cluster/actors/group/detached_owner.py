"""A process that owns a kept group and is killed: starts it on the cluster it is given, says where it is, and waits."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

from cluster.actors.group.detached_actors import DetachedOptions
from cluster.actors.group.detached_group import DetachedGroup
from cluster.actors.host.ray_session import ray_session
from tests.cluster.actors.group.lasting_program import MakeLasting


def main(address: str, name: str, folder: str, timeout_s: float) -> None:
    with ray_session(address, log_to_driver=False):
        group = DetachedGroup(MakeLasting(folder), 2, detached=DetachedOptions(name=name, orphan_timeout_s=timeout_s))
        pids = [ready.pid for ready in group.start()]
        print(json.dumps({"where": asdict(group.whereabouts), "pids": pids}), flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
