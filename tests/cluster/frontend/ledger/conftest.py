"""For all tests of the ledger."""

from __future__ import annotations

import pytest

from cluster.frontend.ledger import ledger_writer


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's disk is not a slow one."""
    monkeypatch.setattr(ledger_writer, "PATIENCE_S", 60.0)
