"""Errors of numbers that are not finite."""

from __future__ import annotations

from parallel.errors import TpError


class NonFinite(TpError, FloatingPointError):
    """A loss, gradient norm or log-probability that is not a finite number; nothing was applied."""


class PoisonBatch(NonFinite):
    """A batch that ends a run; it comes again whenever the run is taken up before it."""


class BrokenUpdate(NonFinite):
    """Finite gradients, from which an update would make weights or moments that are not finite; nothing was applied."""
