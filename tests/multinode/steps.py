"""The walk's steps, on hosts that hosts.sh makes: what docs/multi-node.md says, typed in, and what must come of it.

Ranks are found where they run by looking at the hosts' processes, so that a host with a rank can be lost on purpose.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.multinode.commands import Command, Failed, run

HEAD, WORKERS = "10.77.0.11", ("10.77.0.12", "10.77.0.13")
NAMED_S = 10.0
"""Within which a lost host must be named."""
SMALL = "--num-cpus=1 --object-store-memory=100000000"  # one rank to a host, so that two ranks are two hosts
COUNT_NODES = """import ray
ray.init("auto", logging_level=40, log_to_driver=False)
print(sum(node["Alive"] for node in ray.nodes()))"""


class Walk:
    """Three hosts, and everything done with them."""

    def __init__(self, base: Path, steps: int) -> None:
        self.base, self.steps = base, steps
        self.shared = base / "shared"
        self.file = base / "own-machines.yaml"
        self.out = self.shared / "run"
        self.times: list[tuple[str, float]] = []

    def all(self) -> None:
        for step in self.steps_in_order():
            began = time.monotonic()
            print(f"\n=== {(step.__doc__ or '').splitlines()[0]}", flush=True)
            step()
            self.times.append((step.__name__, time.monotonic() - began))
        print("\n" + "\n".join(f"{name:15} {seconds:6.1f} s" for name, seconds in self.times))

    def steps_in_order(self) -> list[Callable[[], None]]:
        look = [self.hosts, self.up, self.preflight, self.slow_cable]
        return [*look, self.disturbed_run, self.resumed_run, self.host_back, self.served, self.down]

    def hosts(self) -> None:
        """Three hosts with ssh."""
        self._hosts("bridge")
        for number in (1, 2, 3):
            self._hosts("up", str(number))
        self.write_file()

    def up(self) -> None:
        """A cluster: one token for everybody, then `ray up`."""
        run("sh", "-c", "umask 077; ray get-auth-token --generate > /dev/null")
        run("ray", "up", "-y", "--no-config-cache", str(self.file), limit=300, show="New status|rror:|failed")
        refused = self.exec("RAY_AUTH_MODE=disabled python -c 'import ray; ray.init(\"auto\")' 2>&1 | tail -n 1")
        if refused.wait(60) == 0 and not any("Failed to connect" in line for _, line in refused.lines):
            raise Failed("the cluster let somebody in who had no token")

    def preflight(self) -> None:
        """A model to begin with, and a look at the hosts."""
        tokenizer = self._data("tokenizers/gpt-neox-20b")
        self.done(f"tp-decoders init tiny-gpt-neox {self.shared}/base --tokenizer {tokenizer}")
        self.done(self.preflight_command())

    def slow_cable(self) -> None:
        """The cable of one host is made slow: the preflight must name that host."""
        self._hosts("slow", "3")
        looked = self.exec(self.preflight_command())
        if looked.wait(240) == 0 or not any("ODD: 10.77.0.13: all its links" in line for _, line in looked.lines):
            raise Failed("the slow host was not named")
        self._hosts("fast", "3")

    def disturbed_run(self) -> None:
        """Fine-tuning with tensor-parallel ranks on two hosts; one of them loses power."""
        training = self.exec(self.train_command())
        training.says("training gpt_neox", 240)
        self._until(lambda: self._step() >= self.steps // 2, 240, "half of the steps")
        self._lose(training, r"tp-decoders train: .*rank \d on 10\.77\.0\.\d+: .*")
        if training.wait(60) == 0:
            raise Failed("a run that lost a host ended as if nothing had happened")

    def resumed_run(self) -> None:
        """The same command on the hosts that are left."""
        run_again = self.exec(self.train_command())
        _, line = run_again.says(r"from step (\d+) to", 240)
        if "from step 0 " in line:
            raise Failed("it began anew")
        if run_again.wait(300) != 0 or self._step() != self.steps:
            raise Failed(f"the run stands at step {self._step()} of {self.steps}")

    def host_back(self) -> None:
        """The lost host has power again: Ray's autoscaler takes it back by itself."""
        self._hosts("up", str(self.lost))
        self._until(lambda: self._nodes() == 3, 180, "three nodes")

    def served(self) -> None:
        """The result served by two hosts, called through the tunnel of --port-forward; one of them loses power."""
        serve = self.exec(
            f"tp-decoders serve --model {self.out}/step-{self.steps:08d} --tp 2 --ray-address auto "
            "placement.strategy=STRICT_SPREAD placement.join_timeout_s=180 engine.kv_blocks=64",
            "--port-forward", "50051",
        )  # fmt: skip
        serve.says("ready: ", 240)
        ask = ["python", "-m", "launch", "generate", "--temperature", "0.8", "--seed", "7", "--max-new-tokens", "230"]
        undisturbed = run(*ask, "To be").text
        stream = Command([*ask, "To be"])
        time.sleep(1.0)
        self._lose(serve, r"rank \d on 10\.77\.0\.\d+: ")
        self._what_became_of(serve, stream, undisturbed)

    def down(self) -> None:
        """`ray down`."""
        run("ray", "down", "-y", str(self.file), show="Stopped|No nodes|terminated|rror")

    def post_mortem(self) -> None:
        """What the head had to say, after a failure."""
        logs = sorted((self.base / "hosts/1/tmp/ray/session_latest/logs").glob("monitor.*"))
        for log in logs:
            print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]))

    def train_command(self) -> str:
        return (
            f"tp-decoders train --config laptop-gpt-neox model={self.shared}/base out={self.out} "
            f"corpus.path={self._data('text/tinyshakespeare.txt')} steps={self.steps} save_every=4 eval_every=null "
            "samples.prompts=[] parallel.tp=2 placement.strategy=PACK placement.join_timeout_s=180 "
            "ray.address=auto ray.num_cpus=null plot=false placement.max_restarts=0"
        )

    def preflight_command(self) -> str:
        return f"tp-decoders preflight --ranks 3 --strategy STRICT_SPREAD --wait 180 --model {self.shared}/base"

    def write_file(self) -> None:
        """launch/ray/own-machines.yaml with this place's addresses, and without installing what every host has."""
        text = Path("launch/ray/own-machines.yaml").read_text(encoding="utf-8").replace("/shared", str(self.shared))
        config = yaml.safe_load(text)
        config["provider"] |= {"head_ip": HEAD, "worker_ips": list(WORKERS)}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.base / "keys/user")}
        config["setup_commands"][-1] = "tp-decoders --version"
        config["rsync_exclude"].remove("_build")  # the kernels are built: the hosts are one machine
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            config[name][-1] += f" {SMALL}"
        self.file.write_text(yaml.safe_dump(config))

    def exec(self, command: str, *options: str) -> Command:
        """On the head, without waiting for its end."""
        return Command(["ray", "exec", str(self.file), command, *options])

    def done(self, command: str) -> Command:
        return run("ray", "exec", str(self.file), command, limit=240)

    def _data(self, name: str) -> Path:
        return self.base / "tree/tests/data" / name

    def _hosts(self, *words: str) -> None:
        run(str(self.base / "tree/tests/multinode/hosts.sh"), *words)

    def _step(self) -> int:
        """Of the run, by its newest record."""
        metrics = self.out / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def _nodes(self) -> int:
        """Alive, by the head."""
        words = ["ray", "exec", str(self.file), f"python -c '{COUNT_NODES}'"]
        asked = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        numbers = [line.strip() for line in asked.stdout.splitlines() if line.strip().isdigit()]
        return int(numbers[-1]) if numbers else 0

    def _until(self, true: Callable[[], bool], limit: float, what: str) -> None:
        began = time.monotonic()
        while not true():
            if time.monotonic() - began > limit:
                raise Failed(f"no {what} within {limit:g} s")
            time.sleep(0.2)
        print(f"           {what} after {time.monotonic() - began:.1f} s", flush=True)

    def _lose(self, command: Command, pattern: str) -> None:
        """Takes the power from a host that has a rank and is not the head; the command must name it in time."""
        self.lost = max(number for number in (2, 3) if self._has_rank(number))
        seen = len(command.lines)
        cut = time.monotonic()
        self._hosts("off", str(self.lost))
        when, line = command.says(pattern, 60, after=seen)
        print(f"  host{self.lost} lost power; {when - cut:.1f} s later: {line.strip()}", flush=True)
        if f"10.77.0.1{self.lost}" not in line:
            raise Failed(f"host{self.lost} was lost, another was named")
        if when - cut > NAMED_S:
            raise Failed(f"named after {when - cut:.1f} s, the limit is {NAMED_S:g} s")

    def _has_rank(self, number: int) -> bool:
        """Whether a process of the host is a rank's."""
        pid = (self.base / f"hosts/{number}/pid").read_text().strip()
        network = os.readlink(f"/proc/{pid}/ns/net")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if b"ray::Worker" in (folder / "cmdline").read_bytes() and os.readlink(folder / "ns/net") == network:
                    return True
            except OSError:  # it has gone
                continue
        return False

    def _what_became_of(self, serve: Command, stream: Command, undisturbed: str) -> None:
        """The open stream either went on to the very text of before, or ended with an error that says why."""
        if stream.wait(120) == 0:
            if stream.text != undisturbed:
                raise Failed("the stream went on with another text")
            print("           the open stream went on: the same text to its last letter", flush=True)
            run("python", "-c", "from cluster.rpc.client.client import Client; Client('127.0.0.1:50051').drain(5.0)")
        if serve.wait(60) != 0 and stream.ended_well:
            raise Failed("a server that was drained ended with an error")
