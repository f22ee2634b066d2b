"""Writing a checkpoint folder: safetensors files filled one tensor at a time, an index where there are several,
config and tokenizer.

Everything is written beside the target and renamed at the end, so that a reader finds a complete folder or none.
Errors of the disk are remembered and reported by `finish`, because the ranks must go on with their collectives until
then. Knows nothing of sharding; the files are slice_writer's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from parallel.errors import CheckpointError
from tp_decoders.checkpoint.config_writer import config_to_write
from tp_decoders.checkpoint.slice_writer import SliceFiles, TensorPlan
from tp_decoders.files.companion_files import companions, copy_files
from tp_decoders.model.config import DecoderConfig


class FolderWriter:
    """Writes the planned tensors."""

    def __init__(self, target: Path, plans: Sequence[TensorPlan], max_bytes: int) -> None:
        self.target = target
        self.draft = target.with_name(f"{target.name}.part-{os.getpid()}")
        self.error: str | None = None
        self._files = SliceFiles(self.draft, "model", plans, max_bytes)
        self._dtype = plans[0].dtype

    def start(self) -> str | None:
        """Makes the draft folder and its files; what is wrong, if anything is."""
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            self.error = f"{self.target} exists and is not an empty folder; save to a new one"
            return self.error
        try:
            self.draft.mkdir(parents=True)
            self._files.lay_out()
        except (OSError, CheckpointError) as error:
            self.error = f"cannot write a checkpoint to {self.target}: {error}"
            shutil.rmtree(self.draft, ignore_errors=True)
        return self.error

    def write(self, name: str, tensor: Tensor) -> None:
        """A full tensor; after a failure, does nothing."""
        if self.error is None:
            try:
                self._files.write_whole(name, tensor)
            except CheckpointError as error:
                self.error = str(error)

    def finish(self, config: DecoderConfig, source: Path | None) -> str | None:
        """Adds config.json and the companions of `source`, renames the draft; what went wrong, if anything did."""
        try:
            if self.error is None:
                self._files.sync()
                self._files.write_index()
                text = json.dumps(config_to_write(config, self._dtype), indent=2, sort_keys=True) + "\n"
                (self.draft / "config.json").write_text(text, encoding="utf-8")
                if source is not None:
                    copy_files(companions(source), self.draft)
                os.replace(self.draft, self.target)
        except OSError as error:
            self.error = f"cannot finish the checkpoint {self.target}: {error}"
        if self.error is not None:
            shutil.rmtree(self.draft, ignore_errors=True)
        return self.error
