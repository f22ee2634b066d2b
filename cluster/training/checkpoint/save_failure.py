"""How the ranks of one save tell each other that it has failed, so that none waits for a part that never comes.

Two ways, either of which is enough: a file beside the draft, in the folder that all of them write to; and the store at
which the ranks met, where there is one, for a rank that cannot write there at all. No collective: saves run in threads
beside the model's own.
"""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

import torch.distributed as dist

log = logging.getLogger(__name__)
UNKNOWN = "another rank failed and could not say why; its log does"


class FailureNotice:
    """The notice board of one save; `name` is that save's alone."""

    def __init__(self, folder: Path, name: str, store: dist.Store | None) -> None:
        self.path = folder / f".{name}.failed"
        self._key, self._store = f"save-failed/{name}", store

    def tell(self, cause: str) -> None:
        """Says once for all ranks why the save failed; whoever was first is believed."""
        self._tell_file(cause)
        if self._store is not None:
            try:
                self._store.set(self._key, cause)
            except RuntimeError as error:
                log.warning("the other ranks were not told through the store that a save failed: %s", error)

    def heard(self) -> str | None:
        """The cause that some rank gave, None as long as nothing failed."""
        try:
            return self.path.read_text(encoding="utf-8") or UNKNOWN
        except OSError:
            return self._heard_in_store()

    def _tell_file(self, cause: str) -> None:
        """With its words at once; on a full disk an empty file, which needs no block, has to do."""
        draft = self.path.with_name(f"{self.path.name}-{secrets.token_hex(4)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(cause, encoding="utf-8")
            os.replace(draft, self.path)
        except OSError:
            try:
                self.path.touch()
                draft.unlink(missing_ok=True)
            except OSError as error:
                log.warning("the other ranks were not told by a file that a save failed: %s", error)

    def _heard_in_store(self) -> str | None:
        try:
            if self._store is not None and self._store.check([self._key]):
                return self._store.get(self._key).decode()
        except RuntimeError as error:
            log.debug("the store is gone: %s", error)
        return None
