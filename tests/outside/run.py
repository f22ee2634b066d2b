"""`make outside`: programs of others, unmodified, each from an environment of its own, against a real server of ours.

    python -m tests.outside.run [NAME ...]        all, or those named

The model is a tiny GPT-2 trained on Shakespeare here (build/outside). Environments are .venv-outside-NAME, made once.
What a program printed is kept in docs/outside-NAME.txt; one that fails ends the run with an error after the others. A
program is a row of PROGRAMS: its packages, and a script of programs/ that is given the server's address.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.commands.server_process import Server

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "programs"
WORK = ROOT / "build" / "outside"
TEMPLATE = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
STEPS = 150


@dataclass(frozen=True)
class Program:
    """One outside program. `more`: what its script is given behind the server's address, with {names} of `values`."""

    name: str
    script: str
    packages: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    torch: bool = False  # this environment's torch is lent to it
    ours: tuple[str, ...] = ()  # a module of ours that then judges, and what it is given
    seconds: int = 900


PROGRAMS = (
    Program("openai", "openai_client.py", ("openai==3.57.0",)),
    Program("openai1", "openai_client.py", ("openai<2",)),
    Program(
        "lm-eval", "lm_eval_scores.py", ("lm-eval[api]==0.4.13", "transformers>=4.57,<5", "accelerate"),
        more=("{model}", "{work}/scores.json"), torch=True,
        ours=("tests.outside.programs.same_scores", "{grpc}", "{work}/scores.json"),
    ),
    Program("langchain", "langchain_chat.py", ("langchain-openai==1.7.4",)),
    Program("litellm", "litellm_calls.py", ("litellm",)),
    Program("curl", "curl.sh"),
    Program("schemathesis", "schemathesis.sh", ("schemathesis==4.32.5",)),
    Program("malformed", "malformed.py", more=("10000", "{pid}")),
)  # fmt: skip


def main(names: list[str]) -> int:
    unknown = set(names) - {program.name for program in PROGRAMS}
    if unknown:
        sys.exit(f"{sorted(unknown)}: no such program; there are {[program.name for program in PROGRAMS]}")
    chosen = [program for program in PROGRAMS if not names or program.name in names]
    model, failed = trained(), []
    template = WORK / "chat.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    ranks = os.environ.get("OUTSIDE_TP", "2")
    arguments = ["--model", str(model), "--preset", "small", "--tp", ranks, "--http-port", "0", "--chat-template",
                 str(template), "--state-dir", str(WORK / "state")]  # fmt: skip
    for program in chosen:
        python = environment(program)
        with Server(arguments) as server:
            values = {"model": str(model), "work": str(WORK), "grpc": server.address, "pid": str(server.pid)}
            base = "http://" + server.ready.rpartition("http ")[2]
            lines = asked(program, python, base, values)
        text = "".join(lines)
        print(f"== {program.name}\n{text}", end="", flush=True)
        if lines[-1].startswith("FAILED"):
            failed.append(program.name)
        else:
            (ROOT / "docs" / f"outside-{program.name}.txt").write_text(nameless(text, values), encoding="utf-8")
    print(f"{len(chosen) - len(failed)} passed, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def trained() -> Path:
    """The checkpoint, trained if it is not there yet."""
    folder = WORK / "run" / f"step-{STEPS:08}"
    if not folder.exists():
        words = ["train", "--config", "laptop", f"out={WORK / 'run'}", f"steps={STEPS}",
                 f"schedule.total_steps={STEPS}", f"save_every={STEPS}",
                 f"eval_every={STEPS}"]  # fmt: skip
        subprocess.run([sys.executable, "-m", "launch", *words], cwd=ROOT, check=True)
    link = WORK / "shakespeare"
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return link


def environment(program: Program) -> Path:
    """The Python that the program runs with; that of this process where it needs no package."""
    if not program.packages:
        return Path(sys.executable)
    folder = ROOT / f".venv-outside-{program.name}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join(program.packages)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if program.torch:
        (lib,) = (folder / "lib").glob("python*/site-packages")
        (lib / "torch-of-the-first.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    quiet = ["install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([str(python), "-m", "pip", *quiet, *program.packages], check=True)
    stamp.write_text(wanted)
    return python


def asked(program: Program, python: Path, base: str, values: dict[str, str]) -> list[str]:
    """What it printed, under its command line; a last line that begins with FAILED where it failed."""
    script = HERE / program.script
    first = ["bash"] if script.suffix == ".sh" else [str(python)]
    lines = said([*first, str(script), base, *filled(program.more, values)], python, program.seconds)
    if program.ours and not lines[-1].startswith("FAILED"):
        lines += said([sys.executable, "-m", *filled(program.ours, values)], python, program.seconds)
    return lines


def said(command: list[str], python: Path, seconds: int) -> list[str]:
    shown = " ".join(word.removeprefix(f"{ROOT}/") for word in command)
    environment = {**os.environ, "PYTHON": str(python), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    try:
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [f"$ {shown}\n", f"FAILED: not over after {seconds} s\n"]
    lines = [f"$ {shown}\n", *ran.stdout.splitlines(keepends=True)]
    return lines if ran.returncode == 0 else [*lines, *ran.stderr.splitlines(keepends=True)[-30:], "FAILED\n"]


def filled(words: tuple[str, ...], values: dict[str, str]) -> list[str]:
    return [word.format(**values) for word in words]


def nameless(text: str, values: dict[str, str]) -> str:
    """Without what is only of this machine and of this run."""
    text = text.replace(f"{ROOT}/", "").replace(values["pid"], "PID")
    text = re.sub(r"\S*bin/python\S*", "python", text)
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
