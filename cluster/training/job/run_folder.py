"""A run's own folder: whose it is, and that only one job writes into it.

    OUT/run.json         what decides the run's numbers; a folder with another one is refused
    OUT/start/           the random weights it began with, if it did
    OUT/tokens/          the corpus, tokenized once
    OUT/step-*/, latest  checkpoints
    OUT/metrics.jsonl, samples.jsonl, skipped.jsonl, tensorboard/, loss.png

Names and ownership only: what is in these files is their writers' business.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from parallel.errors import ConfigError

RUN, TOKENS, START, METRICS, SAMPLES = "run.json", "tokens", "start", "metrics.jsonl", "samples.jsonl"
SKIPPED, TENSORBOARD, PLOT = "skipped.jsonl", "tensorboard", "loss.png"
LOCK_S = 20.0
"""How long a rank waits for the rank of a job that was killed a moment ago to be gone."""
TAIL_BYTES = 1 << 20


def folder_origin(model: Path) -> str:
    """A digest that tells one checkpoint from another without reading all of it: names, sizes, and the files' ends."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def claim_folder(out: Path, run: Mapping[str, Any]) -> Path:
    """The run's folder, new or this very run's; an error for anybody else's, or where it cannot be written."""
    try:
        return _claimed(out, run)
    except OSError as error:
        raise ConfigError(f"out {out} cannot be written: {error.strerror or error}; choose another folder") from error


def _claimed(out: Path, run: Mapping[str, Any]) -> Path:
    path = out / RUN
    if path.is_file():
        check_run(out, run, json.loads(path.read_text(encoding="utf-8")))
        (out / f".{RUN}.part").touch()
        return out
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise ConfigError(f"{out} holds files but no {RUN}: it is not a run of this command; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f".{RUN}.part"
    draft.write_text(json.dumps(run, indent=1), encoding="utf-8")
    os.replace(draft, path)
    return out


def check_run(where: Path, mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuses to go on with another run's numbers."""
    differing = sorted(name for name in mine.keys() | saved.keys() if mine.get(name) != saved.get(name))
    if differing:
        raise ConfigError(
            f"{where} belongs to another run (its {', '.join(differing)} differ); choose another folder, or the "
            "settings of that run"
        )


def lock(path: Path, timeout_s: float = LOCK_S) -> IO[str]:
    """Holds a file for as long as this process lives: two jobs never write into one folder."""
    file = path.open("w", encoding="utf-8")
    limit = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > limit:
                file.close()
                raise ConfigError(
                    f"another job is training in {path.parent}; wait for it, or choose another folder"
                ) from error
            time.sleep(0.1)
