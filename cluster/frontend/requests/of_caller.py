"""A call as that of the caller who is being answered in this context: its account, its share, its priority's reach."""

from __future__ import annotations

from dataclasses import replace

from cluster.access.caller_limits import CALLER, TERMS, WHO, Terms
from cluster.frontend.requests.call import Call


def of_caller(call: Call, answer_bytes: int | None = None) -> Call:
    """`answer_bytes`: that the one message holds in which it is answered; None: it streams."""
    terms = TERMS.get() or Terms()
    mine = replace(call, account=CALLER.get(), caller=WHO.get(), share=terms.share, levels=terms.levels)
    return replace(mine, answer_bytes=answer_bytes)


def turn_of_caller() -> str:
    """Whose work it is, where callers take turns."""
    return (TERMS.get() or Terms()).share.caller
