"""The seam of speculation: whoever guesses the tokens that come next.

A guess is checked against what is drawn at its place, so a drafter may be wrong at will: it costs time, never a token.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

from cluster.engine.sequences.sequence import Sequence


class Drafter(Protocol):
    """Guesses what follows a sequence's tokens. It may keep what it knows of a sequence until that has ended."""

    def propose(self, seq: Sequence, most: int) -> Many[int]:
        """Token ids that may follow `seq.tokens`, in order, at most `most`; none where it has no idea."""
        ...

    def ended(self, seq: Sequence) -> None:
        """The sequence will not be asked for again; its tokens are complete."""
        ...
