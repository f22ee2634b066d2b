"""Where faults strike: three nodes of a standing Ray cluster, with the health checks of docs/serving.md.

`Namespaces` are hosts of their own (tests/multinode/hosts.sh), whose links can be cut; `Raylets` are several raylets of
this machine, for where there is no root. Both know which processes belong to a node and start it again after its end,
as whoever runs a cluster would. What runs on the cluster is not theirs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.launch.training.kill_training import family_of
from tests.multinode.commands import Command, Failed

HEAD = 1
CHECKS = {
    "health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}  # fmt: skip
"""As docs/serving.md has them."""
CORES, STORE_BYTES = 2, 80_000_000
"""Of a node: any two of the three have room for two ranks that serve and two that train."""
ATTEMPTS = 8
"""Ray gives its own start half a minute, which a busy machine does not always keep to."""
LEAVE_S = 12.0
"""How long what is left of a lost node may take to end by itself before it is ended."""


class Hosts(Protocol):
    """Three nodes; number 1 is the head, where both commands run and which no fault strikes as a whole."""

    numbers: tuple[int, ...]
    can_cut: bool

    @property
    def address(self) -> str:
        """Of Ray."""
        ...

    def start(self, number: int) -> None:
        """A node's Ray, at first and again."""
        ...

    def raylet(self, number: int) -> int | None:
        """Its process, while there is one."""
        ...

    def node(self, number: int) -> str:
        """By what address the product names it."""
        ...

    def name(self, number: int) -> str:
        """What it calls itself."""
        ...

    def command(self, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """How a command is given on the head, and its environment."""
        ...

    def link(self, number: int, state: str) -> None: ...

    def clear(self, number: int) -> None:
        """What a lost node left behind, where it does not end by itself."""
        ...

    def close(self) -> None: ...


class Namespaces:
    """Three hosts of their own, below the folder `base` that tests.multinode.ground furnished."""

    numbers: tuple[int, ...] = (1, 2, 3)
    can_cut = True
    address = "10.77.0.11:6379"

    def __init__(self, base: Path) -> None:
        self._script = base / "tree/tests/multinode/hosts.sh"
        self._base = base
        self._env = dict(os.environ) | {"HOME": os.environ["HOST_HOME"]} | _ray_settings() | injected(base)
        self._run("bridge")
        for number in self.numbers:
            self._run("up", str(number))

    def start(self, number: int) -> None:
        head = ["--head", "--port=6379", "--include-dashboard=false"] if number == HEAD else []
        where = [] if number == HEAD else [f"--address={self.address}"]
        size = [f"--num-cpus={CORES}", f"--object-store-memory={STORE_BYTES}", f"--node-ip-address={self.node(number)}"]
        words = ["in", str(number), "ray", "start", *head, *where, *size, "--disable-usage-stats"]
        for left in reversed(range(ATTEMPTS)):
            try:
                self._run(*words, limit=120)
                break
            except Failed as failure:
                if "timed out during startup" not in str(failure) or not left:
                    raise
                self._end_ray(number)

    def raylet(self, number: int) -> int | None:
        found = [pid for pid in self._processes(number) if is_raylet(pid)]
        return found[0] if found else None

    def node(self, number: int) -> str:
        return f"10.77.0.1{number}"

    def name(self, number: int) -> str:
        return f"host{number}"

    def command(self, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        return [str(self._script), "in", str(HEAD), *words], self._env

    def link(self, number: int, state: str) -> None:
        self._run("link", str(number), state)

    def clear(self, number: int) -> None:
        """Ray's processes of that host, the ranks among them."""
        until_gone(lambda: self.raylet(number) is not None)
        self._end_ray(number)

    def _end_ray(self, number: int) -> None:
        for pid in self._processes(number):
            if b"ray" in cmdline(pid):
                end(pid)

    def close(self) -> None:
        for number in reversed(self.numbers):
            self._run("off", str(number))

    def _processes(self, number: int) -> list[int]:
        network = os.readlink(f"/proc/{(self._base / f'hosts/{number}/pid').read_text().strip()}/ns/net")
        return [pid for pid in all_processes() if _network(pid) == network]

    def _run(self, *words: str, limit: float = 60.0) -> None:
        """A command of the script, which must succeed."""
        done = subprocess.run(
            [str(self._script), *words], env=self._env, capture_output=True, text=True, timeout=limit, check=False
        )
        if done.returncode:
            raise Failed(f"hosts.sh {' '.join(words)}: {done.stdout[-1000:]} {done.stderr[-1000:]}")


class Raylets:
    """Three raylets of this machine, without root; they share its network, so no link can be cut."""

    numbers: tuple[int, ...] = (1, 2, 3)
    can_cut = False

    def __init__(self, base: Path) -> None:
        """`base` holds what Ray writes: a short path, for its sockets."""
        self._base = base
        self._nodes: dict[int, Command] = {}
        self._ip, self._port = "127.0.0.1", free_port()

    @property
    def address(self) -> str:
        return f"{self._ip}:{self._port}"

    def start(self, number: int) -> None:
        head = ["--head", f"--port={self._port}", f"--temp-dir={self._base / 'ray'}", "--include-dashboard=false"]
        head += [f"--ray-client-server-port={free_port()}"]
        where = head if number == HEAD else [f"--address={self.address}"]
        ports = ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        size = [f"--num-cpus={CORES}", f"--object-store-memory={STORE_BYTES}"]
        words = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        for left in reversed(range(ATTEMPTS)):
            log = self._base / "logs" / f"ray-{number}.log"
            node = Command([*words, *where, *size, *ports], env=self.command([])[1], log=log)
            try:
                node.says("Ray runtime started", 90)
                self._nodes[number] = node
                self._ip = node.says(r"Local node IP: \S+", 1)[1].split()[-1]
                break
            except Failed:
                _end_family(node.pid)
                if not left or "timed out during startup" not in node.text:
                    raise

    def raylet(self, number: int) -> int | None:
        node = self._nodes.get(number)
        found = [pid for pid in children(node.pid) if is_raylet(pid)] if node and node.status is None else []
        return found[0] if found else None

    def node(self, number: int) -> str:
        return self._ip

    def name(self, number: int) -> str:
        return socket.gethostname()

    def command(self, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        return list(words), dict(os.environ) | _ray_settings() | injected(self._base) | {"RAY_AUTH_MODE": "disabled"}

    def link(self, number: int, state: str) -> None:
        raise AssertionError("raylets of one machine have no link")

    def clear(self, number: int) -> None:
        """`ray start` ends with its raylet, and ends the others."""
        until_gone(lambda: self._nodes[number].status is None)
        _end_family(self._nodes[number].pid)

    def close(self) -> None:
        for number in reversed(self.numbers):
            if number in self._nodes:
                _end_family(self._nodes[number].pid)


def _end_family(pid: int) -> None:
    """A process and all below it."""
    for each in sorted(family_of(pid)):
        end(each)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def switches(base: Path) -> Path:
    """The folder that says which injected faults are on."""
    return base / "switches"


def injected(base: Path) -> dict[str, str]:
    """What makes processes take faults that are put into them (tests/chaos/faults/injected)."""
    switches(base).mkdir(exist_ok=True)
    folder = Path(__file__).resolve().parents[1] / "faults" / "injected"
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "TP_CHAOS_SWITCHES": str(switches(base))}


def _ray_settings() -> dict[str, str]:
    checks = {f"RAY_{name}": str(value) for name, value in CHECKS.items()}
    return checks | {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


# ---------------------------------------------------------------------------------------------------------- processes


def all_processes() -> list[int]:
    return sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*"))


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def status_of(pid: int) -> Mapping[str, str]:
    """What the kernel says of a process; empty where it has gone or is only waited for."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    said = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {} if said.get("State", "Z").lstrip()[0] in "ZX" else said


def inner_pid(pid: int) -> int:
    """By what number it knows itself, in its own namespace."""
    return int(status_of(pid).get("NSpid", str(pid)).split()[-1])


def children(pid: int) -> list[int]:
    return [each for each in all_processes() if status_of(each).get("PPid", "").strip() == str(pid)]


def is_raylet(pid: int) -> bool:
    return b"raylet/raylet\0" in cmdline(pid) and bool(status_of(pid))


def ranks_below(raylet: int) -> list[int]:
    return [pid for pid in children(raylet) if cmdline(pid).startswith(b"ray::Worker")]


def training_rank(pid: int, below: Path) -> int | None:
    """Which rank of the training job it is, by the lock it holds in the run's folder; None: not one of it."""
    try:
        open_files = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return None
    for name in open_files:
        path = Path(name)
        if path.name.startswith(".rank-") and below in path.parents:
            return int(path.name.removeprefix(".rank-").removesuffix(".lock"))
    return None


def end(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def until_gone(there: Any, limit: float = LEAVE_S) -> bool:
    """Whether it went by itself within the limit."""
    deadline = time.monotonic() + limit
    while there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def command_process(pid: int) -> int:
    """The command itself, where nsenter stands before it."""
    before = (b"nsenter", b"bash", b"/usr/bin/env", b"env", b"setsid")
    while cmdline(pid).startswith(before) and (below := children(pid)):
        pid = below[0]
    return pid


def _network(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def python(*words: str) -> list[str]:
    return [sys.executable, *words]
