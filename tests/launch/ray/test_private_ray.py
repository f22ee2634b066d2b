"""The Ray cluster that `serve` starts for itself lets in nobody who has not the token of that very run."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.commands.server_process import Server
from launch.ray.private_ray import FILE, MODE, TOKEN, own_ray
from parallel.native.compiled import library

NANO = Path(__file__).resolve().parents[2] / "data" / "gpt-nano-sort"
VARIABLES = (MODE, TOKEN, FILE)
CLIENT = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    print(len(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, 20)), "keys")
except AuthenticationError as refused:
    print("refused:", str(refused).splitlines()[0])
"""


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier test's Ray leaves its mode in the environment of this process."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def seen() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_a_run_has_a_token_of_its_own_that_only_its_user_reads_and_that_goes_with_it() -> None:
    tokens = set()
    for _ in range(2):
        with own_ray(None):
            assert seen().keys() == {MODE, FILE} and seen()[MODE] == "token"
            path = Path(seen()[FILE])
            assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            tokens.add(path.read_text())
        assert not path.parent.exists() and not seen()
    assert len(tokens) == 2 and all(len(token) == 64 for token in tokens)


def test_the_token_goes_where_the_run_fails() -> None:
    with pytest.raises(KeyboardInterrupt), own_ray(None):
        path = Path(seen()[FILE])
        raise KeyboardInterrupt
    assert not path.parent.exists() and not seen()


SIGNALLED = """
import os, signal
from launch.ray.private_ray import FILE, own_ray
with own_ray(None):
    print(os.environ[FILE], flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
"""


def test_the_token_goes_where_a_command_is_ended_before_it_has_handlers_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr and done.stdout.strip() and not Path(done.stdout.strip()).parent.exists()


@pytest.mark.parametrize("given", [{MODE: "disabled"}, {TOKEN: "t" * 64}, {MODE: "token", FILE: "/somewhere/else"}])
def test_what_somebody_has_set_is_left_as_it_is(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with own_ray(None):
        assert seen() == given
    assert seen() == given


def test_a_standing_cluster_has_its_own() -> None:
    with own_ray("10.0.0.1:6379"):
        assert not seen()


def processes() -> Iterator[tuple[int, int, str]]:
    """Number, parent and arguments of every process of this machine that can be seen."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                yield int(folder.name), parent, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("latin-1")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue


def setting(server: Server, name: str) -> str:
    """What one of Ray's processes was started with."""
    lines = [line for _, parent, line in processes() if parent == server.pid]
    return next(match[1] for line in lines if (match := re.search(rf"--{name}=(\S+)", line)))


def token_file(server: Server) -> Path:
    """From the environment of Ray's head."""
    head = next(pid for pid, parent, line in processes() if parent == server.pid and "gcs_server" in line)
    given = (line.partition(b"=") for line in Path(f"/proc/{head}/environ").read_bytes().split(b"\0"))
    return Path({name.decode(): value.decode() for name, _, value in given}[FILE])


def ask(address: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", CLIENT, address], env=clean | environment, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_who_has_not_the_token_is_refused_at_rays_port_and_it_is_shown_nowhere() -> None:
    library.available()  # built here where it is not yet
    with Server(["--model", str(NANO), "--preset", "small", "--cluster", "cpu-2", "-v"], timeout_s=400) as server:
        address, session = setting(server, "gcs-address"), Path(setting(server, "session-dir"))
        token = (path := token_file(server)).read_text()
        for refused in ({MODE: "disabled"}, {MODE: "token", TOKEN: "0" * 64}):
            assert ask(address, **refused).startswith("refused: RPC error: InvalidAuthToken")
        assert ask(address, **{MODE: "token", FILE: str(path)}).endswith(" keys\n")
        assert not [line for _, _, line in processes() if token in line]
        assert token not in server.said + server.ready
        logs = [file for file in (session / "logs").rglob("*") if file.is_file()]
        assert len(logs) > 5
        assert not [file.name for file in logs if token.encode() in file.read_bytes()]
    assert not path.exists()
