"""Joining a Ray cluster, or starting one on this machine for as long as it is needed.

A local cluster is asked for by name (address "local"): without it Ray would join whatever a stale address file points
at. Reads no environment of its own; what a standing cluster needs there is in docs/serving.md, and folder and token of
one that is started here come from launch.ray.private_ray.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from cluster.actors.host.rank_output import show_rank_output
from cluster.actors.host.ray_address import own_address
from cluster.actors.host.ray_head import RayHead, bare, on_loopback, own_sessions
from cluster.actors.host.start_signals import interruptible
from parallel.errors import ConfigError, WorkerError

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 100_000_000
"""Nothing large travels through the object store: plans go over the ranks' own collectives, weights come from files."""
CONNECT_S = 5.0
STARTS = 4
"""How often a local cluster is started: Ray gives it half a minute, which a busy machine does not always keep to."""

PACKAGES = Path(__file__).resolve().parents[3]
"""Where this package and its neighbours lie."""
TOO_SLOW = ("timed out during startup", "Timed out waiting for file")


@contextmanager
def ray_session(
    address: str | None = None, num_cpus: int | None = None, log_to_driver: bool = True, head: RayHead | None = None
) -> Iterator[RayHead]:
    """Connected to `address`, or to a cluster of this machine alone that ends with the block; its own processes.

    A SIGINT or SIGTERM that comes while it starts or joins is a KeyboardInterrupt.
    """
    if num_cpus is not None and num_cpus < 1:
        raise ConfigError(f"num_cpus is {num_cpus}; a local Ray cluster needs at least 1")
    if num_cpus is not None and address is not None:
        raise ConfigError(f"num_cpus={num_cpus} is for a local cluster; {address} has the cores it has: leave it out")
    if address == "auto":
        address = own_address()
    if address is not None:
        check_reachable(address)
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    head = head or RayHead()
    try:
        alone = address is None or only_on_loopback(address)
        with ExitStack() as around:
            around.enter_context(interruptible())
            for each in (own_sessions(), *((on_loopback(),) if alone else ()), *((bare(),) if address is None else ())):
                around.enter_context(each)
            _init(address or "local", options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerError(_cannot_join(address, error)) from error
    try:
        if address is None:
            head.watch()
        yield head
    finally:
        if not head.left(ray.shutdown):
            head.end()  # Ray itself would wait for what is gone
        head.close()


def _init(address: str, options: dict[str, Any]) -> None:
    """What a start that was too slow leaves behind ends with this process.

    Ray puts the folder it is called from before all others where its workers look for modules: called from where our
    packages lie, since the user's own may hold a `cluster` or a `queue.py`.
    """
    for left in reversed(range(STARTS)):
        try:
            with _called_from(PACKAGES):
                ray.init(address=address, **options)
            if options["log_to_driver"]:
                show_rank_output()
            return
        except Exception as error:
            if not any(words in str(error) for words in TOO_SLOW):
                raise
            if not left:
                raise RuntimeError(str(error)) from error
            log.warning("Ray did not start within its own limit; once more")


@contextmanager
def _called_from(folder: Path) -> Iterator[None]:
    """In another folder for a while. Where the way back is closed to this user (`sudo -u` in a folder of root's), as
    after it: what was given as a relative path is a full one by now.
    """
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.chdir(before)


def read_environment_again() -> None:
    """Ray keeps what it found in the environment when it was imported: its mode of authentication, and a token."""
    raylet: Any = ray._raylet
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def check_reachable(address: str) -> None:
    """Refuses an address where nobody listens; Ray itself would try for a minute and more."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise ConfigError(
            f"ray.address is {address!r}; write auto, or HOST:PORT of the cluster's head, as in 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise WorkerError(f"no Ray cluster answers at {address} ({reason}); is that its head, and is it up?") from error


def only_on_loopback(address: str) -> bool:
    """Whether a head is reached at this machine's loopback address and at no other: one that a command has started for
    itself is. Ray takes such an address for the node's other one, where it would look for a minute.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if host not in ("localhost", "::1") and not host.startswith("127."):
        return False
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), CONNECT_S).close()
    except OSError:
        return True
    return False


def _cannot_join(address: str | None, error: Exception) -> str:
    if address is None:
        return f"could not start a local Ray cluster: {first_line(error)}"
    return (
        f"could not join the Ray cluster at {address}: {first_line(error)}; where it asks for a token (`ray start` "
        "says so), set RAY_AUTH_MODE=token here and have its head's ~/.ray/auth_token; where it asks for none, disabled"
    )


def first_line(error: BaseException) -> str:
    """An exception's message without the stack that Ray writes under it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
