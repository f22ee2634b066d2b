"""docs/multi-node.md walked through on three hosts of one machine: `python -m tests.multinode.walk`.

`ray up` with launch/ray/own-machines.yaml over ssh, a small GPT-NeoX fine-tuned with its tensor-parallel ranks on two
hosts, a host lost and the same command going on, the result served through an ssh tunnel, another host lost, `ray
down`. The hosts are namespaces (hosts.sh) inside namespaces of the walk's own, so nothing is left behind however it
ends. Needs root, sshd, ssh, rsync, ip and tc. Prints every command, what it said and how long it took; exits with 1
where a step fails.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.multinode import ground
from tests.multinode.steps import Failed, Walk

DATA = ("tests/multinode", "tests/data/tokenizers/gpt-neox-20b", "tests/data/text")
TOOLS = ("unshare", "ip", "tc", "ssh", "ssh-keygen", "rsync", "sshd")

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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=24, help="of training (default 24)")
    parser.add_argument("--inside", metavar="BASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        return inside(Path(args.inside), args.steps)
    if missing := ground.lacking(TOOLS):
        print(f"the walk needs {', '.join(missing)}", file=sys.stderr)
        return 2
    base = Path(tempfile.mkdtemp(prefix="tp-walk-", dir="/var/tmp"))  # not below /tmp, which every host has for itself
    try:
        ground.furnish(base, DATA)
        make_keys(base)
        again = [sys.executable, "-m", "tests.multinode.walk", "--inside", str(base), "--steps", str(args.steps)]
        return ground.enter(base, again, ground.environment(base))
    finally:
        shutil.rmtree(base, ignore_errors=True)


def make_keys(base: Path) -> None:
    """Of the hosts and of their user, and how sshd is set up."""
    (base / "keys").mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", base / "keys" / name], check=True)
    shutil.copy(base / "keys/user.pub", base / "keys/authorized")
    (base / "sshd_config").write_text(SSHD.format(base=base))


def inside(base: Path, steps: int) -> int:
    """The walk, in namespaces of its own: what is mounted, started or linked here ends with this process."""
    ground.make_private(base)
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
