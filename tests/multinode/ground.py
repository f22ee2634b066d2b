"""The ground that the hosts of hosts.sh stand on: a folder with the tree as it is now, homes, and namespaces around
all of it, so that nothing is left behind however a run ends.

Used by the walk and by tests/chaos. Starts no host.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ("parallel", "tp_decoders", "cluster", "launch", "configs")
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
OWN_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--mount-proc")
SYSTEM = "/usr/sbin:/sbin"

PROFILE = """export PATH=$HOME/bin:{path}
export PYTHONPATH=$HOME/tp-decoders RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
"""  # what launch/ray/install.sh does where it installs


def lacking(tools: Sequence[str]) -> list[str]:
    """What this machine has not."""
    path = f"{os.environ['PATH']}:{SYSTEM}"
    return [*([] if os.geteuid() == 0 else ["root"]), *(tool for tool in tools if not shutil.which(tool, path=path))]


def furnish(base: Path, data: Sequence[str]) -> None:
    """The tree with these folders of it besides, what every host's home begins with, and the folder all hosts share."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in (*TREE, *data):
        shutil.copytree(ROOT / name, base / "tree" / name, ignore=skip, dirs_exist_ok=True)
    for name in FILES:
        shutil.copy(ROOT / name, base / "tree" / name)
    for name in ("shared", "hosts", "home/bin", "laptop/tmp"):
        (base / name).mkdir(parents=True)
    for name in (".bashrc", ".profile"):
        (base / "home" / name).write_text(PROFILE.format(path=search_path()))
    command = base / "home/bin/tp-decoders"
    command.write_text('#!/bin/sh\nexec python -m launch "$@"\n')
    command.chmod(0o755)
    build = "from parallel.native.compiled.library import library; library()"  # once: the hosts are one machine
    subprocess.run([sys.executable, "-c", build], cwd=base / "tree", check=True)


def search_path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SYSTEM}"


def environment(base: Path, sshd: bool = True) -> dict[str, str]:
    """Of the run itself, which stands for the user's laptop, and of the hosts' first process."""
    home = pwd.getpwuid(os.geteuid()).pw_dir
    given = {
        "PATH": search_path(),
        "HOME": str(base / "laptop"),
        "BASE": str(base),
        "HOST_HOME": home,
        "KEEP": " ".join(folder for folder in pythons() if folder.startswith(home + "/")),
        "KEEP_TMP": " ".join(folder for folder in pythons() if folder.startswith("/tmp/")),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(base / "tree"),
        "TERM": "dumb",
    }
    return given | ({"SSHD": shutil.which("sshd", path=search_path()) or "sshd"} if sshd else {})


def pythons() -> list[str]:
    """Where the interpreter and its packages lie, which mounts must not hide."""
    return sorted({str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)})


def enter(base: Path, words: Sequence[str], env: dict[str, str]) -> int:
    """Runs a command in namespaces of its own, with the tree's copy as its folder."""
    return subprocess.run(["unshare", *OWN_NAMESPACES, *words], cwd=base / "tree", env=env, check=False).returncode


def make_private(base: Path) -> None:
    """First of all inside: mounts stay here, and /tmp is this run's own, but for a Python that lies there."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for folder in (folder for folder in pythons() if folder.startswith("/tmp/")):
        place = base / "laptop" / folder.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", folder, place], check=True)
    subprocess.run(["mount", "--rbind", base / "laptop/tmp", "/tmp"], check=True)
