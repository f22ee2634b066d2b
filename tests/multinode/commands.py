"""Runs the walk's commands: each is printed as a user would type it, its output with the seconds since it began.

A command in the background (a server, a run that is to be disturbed) is watched for what it says. Knows no step.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

NOISE = re.compile(
    r"^\s*$|^Shared connection|^Connection to .* closed|^bash: (cannot set terminal|no job control)"
    r"|^\d{4}-\d\d-\d\d [\d:,]+\t(V*INFO|V*WARN)|^ +To ensure this mount|^ +ssh -tt "
    r"|^step \d*[1235679]/"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r")


class Failed(Exception):
    """A step did not do what the walk is about."""


class Command:
    """One command, its lines as they come. `quiet` picks those that are shown; with `log` all go to that file alone."""

    def __init__(
        self, words: Sequence[str], quiet: str | None = None, env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:  # fmt: skip
        self.lines: list[tuple[float, str]] = []
        self._quiet = re.compile(quiet) if quiet else None
        self._log = log.open("a", encoding="utf-8", buffering=1) if log else None
        print(f"\n$ {shlex.join(words)}", flush=True, file=self._log)
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=env,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, once it has ended."""
        return self._process.poll()

    @property
    def text(self) -> str:
        """All that it has said."""
        return "\n".join(line for _, line in self.lines)

    def wait(self, limit: float) -> int:
        """Its exit status; ended and a failure where it takes longer."""
        try:
            status = self._process.wait(limit)
        except subprocess.TimeoutExpired as expired:
            self._process.kill()
            raise Failed(f"not done within {limit:g} s") from expired
        self._reader.join(5)
        print(f"  -> exit status {status} after {self.seconds:.1f} s", flush=True, file=self._log)
        return status

    def says(self, pattern: str, limit: float, after: int = 0) -> tuple[float, str]:
        """The first line with this in it, from the line numbered `after` on, and when it came."""
        wanted, deadline = re.compile(pattern), time.monotonic() + limit
        while time.monotonic() < deadline:
            for when, line in self.lines[after:]:
                if wanted.search(line):
                    return when, line
            if self._process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.05)
        raise Failed(f"nothing like {pattern!r} within {limit:g} s")

    @property
    def ended_well(self) -> bool:
        return self._process.poll() == 0

    def _read(self) -> None:
        assert self._process.stdout is not None, "a pipe"
        for raw in self._process.stdout:
            line = COLOURS.sub("", raw).rstrip()
            self.lines.append((time.monotonic(), line))
            if self._log is not None:
                print(f"{self.seconds:8.1f} s  {line}", file=self._log)
            elif not NOISE.search(line) and not (self._quiet and not self._quiet.search(line)):
                print(f"  {self.seconds:6.1f} s  {line[:200]}", flush=True)


def run(*words: str, limit: float = 120.0, show: str | None = None) -> Command:
    """A command that must succeed; `show` picks the lines worth printing."""
    command = Command(words, show)
    if command.wait(limit) != 0:
        for _, line in command.lines[-15:]:
            print(f"           {line[:300]}", flush=True)
        raise Failed(f"{words[0]} failed")
    return command
