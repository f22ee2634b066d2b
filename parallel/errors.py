"""The one family of exceptions of the project.

Every error says what was given, the rule, and what to do. Each class also derives from the closest standard
exception and takes a single message string, so that it survives pickling between processes. How an error is
reported to a client is decided elsewhere.
"""


class TpError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(TpError, ValueError):
    """A configuration, option or argument that cannot work."""


class CheckpointError(TpError, ValueError):
    """A checkpoint that is missing, incomplete, mis-shaped or corrupt."""


class RequestError(TpError, ValueError):
    """A request that breaks a rule of the interface."""


class CapacityError(RequestError):
    """A request that can never fit: the message holds the numbers."""


class QueueFull(CapacityError):
    """No room now; `retry_seconds` is a guess at when there will be."""

    retry_seconds: float = 1.0


class CollectiveError(TpError, RuntimeError):
    """A collective that did not complete: a rank is missing, late, or out of step."""


class WorkerError(TpError, RuntimeError):
    """A worker that failed to start, died, or stopped answering."""


class NativeUnavailable(TpError, RuntimeError):
    """The native kernels cannot be built or loaded on this machine."""


class KernelsWithheld(NativeUnavailable):
    """The native kernels are not used, because a rank of this group has none."""


class OperandError(ConfigError):
    """A tensor that a native kernel cannot take; names the operation, the operand, what was given and the rule."""


class NativeMemoryError(TpError, MemoryError):
    """A native kernel could not get the memory it works in; nothing of its result is to be used."""


class WeightReleased(TpError, RuntimeError):
    """The values of a weight that is stored packed only were asked for, or written to, as a plain tensor's."""
