"""docs/multi-node.md walked through on three hosts of one machine: `python -m tests.multinode.walk`.

`ray up` with launch/ray/own-machines.yaml over ssh, a small GPT-NeoX fine-tuned with its tensor-parallel ranks on two
hosts, a host lost and the same command going on, the result served through an ssh tunnel, another host lost, `ray
down`. The hosts are namespaces (hosts.sh) inside namespaces of the walk's own, so nothing is left behind however it
ends. Needs root, sshd, ssh, rsync, ip and tc. Prints every command, what it said and how long it took; exits with 1
where a step fails.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.multinode.steps import Failed, Walk

ROOT = Path(__file__).resolve().parents[2]
TREE = ("parallel", "tp_decoders", "cluster", "launch", "configs")
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
DATA = ("tests/multinode", "tests/data/tokenizers/gpt-neox-20b", "tests/data/text")
TOOLS = ("unshare", "ip", "tc", "ssh", "ssh-keygen", "rsync", "sshd")
OWN_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--mount-proc")

SSHD = """Port 22
ListenAddress @IP@
HostKey {base}/keys/host
AuthorizedKeysFile {base}/keys/authorized
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile /run/sshd.pid
MaxStartups 100:30:200
"""
PROFILE = """export PATH=$HOME/bin:{path}
export PYTHONPATH=$HOME/tp-decoders RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
"""  # what launch/ray/install.sh does where it installs


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=24, help="of training (default 24)")
    parser.add_argument("--inside", metavar="BASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        return inside(Path(args.inside), args.steps)
    if missing := lacking():
        print(f"the walk needs {', '.join(missing)}", file=sys.stderr)
        return 2
    base = Path(tempfile.mkdtemp(prefix="tp-walk-", dir="/var/tmp"))  # not below /tmp, which every host has for itself
    try:
        furnish(base)
        again = [sys.executable, "-m", "tests.multinode.walk", "--inside", str(base), "--steps", str(args.steps)]
        return subprocess.run(["unshare", *OWN_NAMESPACES, *again], cwd=base / "tree", env=environment(base)).returncode
    finally:
        shutil.rmtree(base, ignore_errors=True)


def lacking() -> list[str]:
    """What this machine has not."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [*([] if os.geteuid() == 0 else ["root"]), *(tool for tool in TOOLS if not shutil.which(tool, path=path))]


def furnish(base: Path) -> None:
    """The tree as it is now, keys, what every host's home begins with, and the folder all hosts share."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in (*TREE, *DATA):
        shutil.copytree(ROOT / name, base / "tree" / name, ignore=skip)
    for name in FILES:
        shutil.copy(ROOT / name, base / "tree" / name)
    for name in ("keys", "shared", "hosts", "home/bin", "laptop/tmp"):
        (base / name).mkdir(parents=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / "keys" / name], check=True)
    shutil.copy(base / "keys/user.pub", base / "keys/authorized")
    (base / "sshd_config").write_text(SSHD.format(base=base))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    for name in (".bashrc", ".profile"):
        (base / "home" / name).write_text(PROFILE.format(path=path))
    command = base / "home/bin/tp-decoders"
    command.write_text('#!/bin/sh\nexec python -m launch "$@"\n')
    command.chmod(0o755)
    build = "from parallel.native.library import library; library()"  # once: the hosts are one machine
    subprocess.run([sys.executable, "-c", build], cwd=base / "tree", check=True)


def environment(base: Path) -> dict[str, str]:
    """Of the walk itself, which stands for the user's laptop, and of the hosts' first process."""
    home = pwd.getpwuid(os.geteuid()).pw_dir
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    pythons = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)}
    return {
        "PATH": path,
        "HOME": str(base / "laptop"),
        "BASE": str(base),
        "HOST_HOME": home,
        "KEEP": " ".join(folder for folder in sorted(pythons) if folder.startswith(home + "/")),
        "SSHD": shutil.which("sshd", path=path) or "sshd",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(base / "tree"),
        "TERM": "dumb",
    }


def inside(base: Path, steps: int) -> int:
    """The walk, in namespaces of its own: what is mounted, started or linked here ends with this process."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", base / "laptop/tmp", "/tmp"], check=True)
    walk = Walk(base, steps)
    try:
        walk.all()
    except Failed as failure:
        print(f"\nFAILED: {failure}", flush=True)
        walk.post_mortem()
        return 1
    print("\nthe walk is done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
