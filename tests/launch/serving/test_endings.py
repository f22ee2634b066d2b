"""The ways `serve` is ended from outside: signals to it, to its process group, to every process there is, and the end
of Ray's own processes. It ends soon, with the status that tells which, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from parallel.native.compiled import library
from tests.cluster.engine.tiny_models import save_tiny
from tests.launch.serving.test_serve import processes_of, wait_until_gone

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
READY_S, GONE_S = 200.0, 100.0
"""Limits for what hangs, on a machine that does much else."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library.available()
    return save_tiny("gpt_neox", tmp_path_factory.mktemp("neox") / "model")


@dataclass
class Served:
    """A server in a session of its own, as a service manager starts it."""

    process: subprocess.Popen[str]
    log: Path
    temporary: Path

    def said(self, words: str, seconds: float = READY_S) -> None:
        end = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < end and self.process.poll() is None, self.text[-3000:]
            time.sleep(0.05)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def family(self) -> set[int]:
        return processes_of(self.process.pid)

    def named(self, name: str) -> int:
        """One of its processes, by the end of its command's first word."""
        for pid in self.family:
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(name.encode()):
                return pid
        raise AssertionError(f"no {name}")

    def ended(self, family: set[int]) -> int:
        status = self.process.wait(GONE_S)
        assert wait_until_gone(family), "processes were left"
        assert not list(self.temporary.glob("tp-decoders-ray-*")), "its token was left"
        assert "Traceback" not in self.text, self.text[-3000:]
        return status


@pytest.fixture
def served(model: Path) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="tp-", ignore_cleanup_errors=True) as folder:  # short, for Ray's sockets
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "launch", "serve", "--port", "0", "--model", str(model), "--tp", "1"]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, "engine.kv_blocks=64"], stdout=out, stderr=out, text=True, start_new_session=True,
                env={**os.environ, "TMPDIR": folder},
            )  # fmt: skip
        running = Served(process, log, Path(folder))
        yield running
        for pid in running.family if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(GONE_S)


def to_group(served: Served) -> None:
    os.killpg(served.process.pid, signal.SIGTERM)


def to_every_process(served: Served) -> None:
    for pid in served.family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("tell", [to_group, to_every_process])
def test_a_signal_to_more_than_the_server_ends_it_with_status_0_at_once_and_leaves_nothing(
    served: Served, tell: Callable[[Served], None]
) -> None:
    served.said("ready: ")
    family, began = served.family, time.monotonic()
    tell(served)
    assert served.ended(family) == 0, served.text[-3000:]
    print(f"ended after {time.monotonic() - began:.1f} s")


@pytest.mark.slow
def test_so_does_one_to_every_process_that_comes_while_it_starts(served: Served) -> None:
    end = time.monotonic() + READY_S
    while len(served.family) < 5:  # Ray's processes are coming
        assert time.monotonic() < end
        time.sleep(0.05)
    family = served.family
    to_every_process(served)
    assert served.ended(family | served.family) in (0, 130), served.text[-3000:]


def test_a_server_whose_own_ray_dies_ends_soon_and_says_so(served: Served) -> None:
    served.said("ready: ")
    family, began = served.family, time.monotonic()
    os.kill(served.named("raylet"), signal.SIGKILL)  # its GCS: tests/cluster/actors/host/test_ray_head.py
    assert served.ended(family) == 1, served.text[-3000:]
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert "the engine is gone: Ray's raylet on this machine ended (by SIGKILL)" in served.text


@pytest.mark.slow
def test_of_a_server_that_is_killed_nothing_is_left_but_its_token(served: Served) -> None:
    served.said("ready: ")
    family = served.family
    served.process.kill()
    served.process.wait(GONE_S)
    assert wait_until_gone(family), "processes were left"
