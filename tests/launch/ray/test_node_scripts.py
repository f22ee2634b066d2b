"""The scripts that `ray up` runs on every node: settings, pinned installation, weights cache. Run by bash in a home of
their own; what they would fetch from elsewhere is played by small programs on the PATH.
"""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "launch/ray"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("secret")
    return tmp_path


def bash(home: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"HOME": str(home), "PATH": f"{home}/bin:/usr/sbin:/usr/bin:/bin", **environment}
    return subprocess.run(["bash", "-c", script], env=given, capture_output=True, text=True, timeout=250, check=False)


def program(home: Path, name: str, text: str) -> None:
    path = home / "bin" / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def source(home: Path, network: str = "own", **environment: str) -> dict[str, str]:
    """The environment a `ray start` after node.sh would see."""
    done = bash(home, f". {FOLDER}/node.sh {network} && env", **environment)
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def test_every_node_asks_for_the_token_and_ranks_get_all_their_threads(home: Path) -> None:
    seen = source(home, OMP_NUM_THREADS="1")
    assert seen["RAY_AUTH_MODE"] == "token" and "OMP_NUM_THREADS" not in seen
    assert stat.S_IMODE((home / ".ray/auth_token").stat().st_mode) == 0o600


def test_a_node_without_the_token_is_not_started(home: Path) -> None:
    (home / ".ray/auth_token").unlink()
    done = bash(home, f". {FOLDER}/node.sh own; echo started")
    assert done.returncode == 2 and "started" not in done.stdout
    assert "ray get-auth-token --generate" in done.stderr


def test_an_unknown_network_is_refused(home: Path) -> None:
    done = bash(home, f". {FOLDER}/node.sh azure; echo started")
    assert done.returncode == 2 and "choose aws, gcp or own" in done.stderr and not done.stdout


def test_the_interface_is_the_one_that_leads_to_the_head(home: Path) -> None:
    program(home, "ip", '[ "$*" = "-o route get 10.0.0.9" ] && echo "10.0.0.9 dev ens7 src 10.0.0.5 uid 0 \\\\ cache"')
    assert source(home, RAY_HEAD_IP="10.0.0.9")["NCCL_SOCKET_IFNAME"] == "ens7"
    assert source(home, RAY_HEAD_IP="10.0.0.9", TP_INTERFACE="ib0")["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "NCCL_SOCKET_IFNAME" not in source(home)  # the head


def test_what_is_set_before_stays(home: Path) -> None:
    assert source(home, "aws")["FI_PROVIDER"] == "efa"
    assert source(home, "aws", FI_PROVIDER="tcp", NCCL_DEBUG="INFO").items() >= {"FI_PROVIDER": "tcp", "NCCL_DEBUG": "INFO"}.items()  # fmt: skip # noqa: E501


def install(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return bash(home, f"{FOLDER}/install.sh {' '.join(arguments)}", TP_PYTHON="python3.11")


@pytest.fixture
def python(home: Path) -> Path:
    """A Python whose environments hold one that writes down what pip was asked for."""
    asked = home / "asked"
    inner = f'#!/bin/bash\\ncase "$2" in pip) shift 3; echo "$@" >> {asked};; esac'
    program(home, "python3.11", f'[ "$2" = venv ] || exit 0\nmkdir -p "$3/bin"\nprintf \'{inner}\' > "$3/bin/python"\nchmod +x "$3/bin/python"')  # fmt: skip # noqa: E501
    return asked


def test_versions_are_pinned_and_a_second_run_installs_nothing(home: Path, python: Path) -> None:
    assert install(home).returncode == 0
    assert install(home).stdout == "install.sh: up to date\n"
    assert python.read_text() == f"--quiet -c {ROOT}/constraints.txt -e {ROOT}[train]\n"
    install(home, "google-api-python-client")  # asked for more: again
    assert python.read_text().splitlines()[1].startswith("--quiet google-api-python-client -c ")


def test_remote_shells_find_the_commands_even_where_bashrc_ends_early(home: Path, python: Path) -> None:
    (home / ".bashrc").write_text("case $- in *i*) ;; *) return;; esac\n")
    install(home)
    install(home)
    seen = bash(home, "source ~/.bashrc; echo $PATH $RAY_AUTH_MODE").stdout
    assert seen.startswith(f"{home}/venv/bin:") and seen.endswith(" token\n")
    assert (home / ".bashrc").read_text().count("venv/bin") == 1


def test_a_node_without_a_fitting_python_is_told_so(home: Path) -> None:
    program(home, "python3.11", "exit 1")
    done = install(home)
    assert done.returncode != 0 and "no Python 3.11 or later" in done.stderr


@pytest.fixture
def shared(home: Path) -> Path:
    """A shared folder, and a hub that writes down each download and takes a moment."""
    (home / "shared").mkdir()
    program(home, "hf", f'echo "$2" >> {home}/downloads; to="${{@: -1}}"; mkdir -p "$to"; sleep 0.3; echo w > "$to/model.safetensors"')  # fmt: skip # noqa: E501
    return home / "shared"


def test_weights_are_downloaded_once_by_nodes_that_ask_at_once(home: Path, shared: Path) -> None:
    script = f"{FOLDER}/weights.sh EleutherAI/pythia-70m & {FOLDER}/weights.sh EleutherAI/pythia-70m & wait"
    done = bash(home, script, TP_SHARED=str(shared))
    assert done.stdout.split() == [f"{shared}/weights/pythia-70m"] * 2
    assert (home / "downloads").read_text() == "EleutherAI/pythia-70m\n"


def test_an_interrupted_download_is_not_taken_for_a_checkpoint(home: Path, shared: Path) -> None:
    program(home, "hf", 'to="${@: -1}"; mkdir -p "$to"; echo half > "$to/model.safetensors"; exit 1')
    done = bash(home, f"{FOLDER}/weights.sh EleutherAI/pythia-70m", TP_SHARED=str(shared))
    assert done.returncode != 0 and not (shared / "weights/pythia-70m").exists()


def test_a_node_may_have_a_copy_of_its_own(home: Path, shared: Path) -> None:
    local = home / "nvme"
    done = bash(home, f"{FOLDER}/weights.sh a/b", TP_SHARED=str(shared), TP_LOCAL=str(local))
    assert done.stdout.strip() == f"{local}/weights/b" and os.listdir(local / "weights/b") == ["model.safetensors"]


def test_a_missing_shared_folder_is_said(home: Path) -> None:
    done = bash(home, f"{FOLDER}/weights.sh a/b", TP_SHARED=str(home / "nowhere"))
    assert done.returncode == 2 and "mount it" in done.stderr
