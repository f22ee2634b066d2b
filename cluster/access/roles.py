"""Who may call what: the table of roles, and the gate that every call passes before its message is read.

A method that is not in the table is nobody's. Health is open to everyone; reflection, where it is on, is for those who
control. Counting of calls and tokens is caller_limits.py, the file of tokens token_file.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.access.access_errors import NotAuthenticated, NotPermitted
from cluster.access.caller_limits import Account, Accounts
from cluster.access.token_file import Role, TokenFile

SCHEME = "Bearer "

GENERATE, TRAIN, CONTROL, OBSERVE = (frozenset({role}) for role in Role)
ABORT = GENERATE | CONTROL
"""To generate: of one's own requests; to control: of anybody's."""
DROP = TRAIN | CONTROL
"""To train: one's own gradients; to control: anybody's."""
ANYONE = frozenset(Role)
"""With any token."""

ROLES = {
    "/tp_decoders.v1.Inference/Generate": GENERATE,
    "/tp_decoders.v1.Inference/GenerateStream": GENERATE,
    "/tp_decoders.v1.Inference/Score": GENERATE,
    "/tp_decoders.v1.Inference/Classify": GENERATE,
    "/tp_decoders.v1.Inference/Embed": GENERATE,
    "/tp_decoders.v1.Inference/Tokenize": GENERATE,
    "/tp_decoders.v1.Inference/Detokenize": GENERATE,
    "/tp_decoders.v1.Training/TrainStep": TRAIN,
    "/tp_decoders.v1.Training/ForwardBackward": TRAIN,
    "/tp_decoders.v1.Training/OptimStep": TRAIN,
    "/tp_decoders.v1.Training/Evaluate": TRAIN,
    "/tp_decoders.v1.Training/SaveState": TRAIN,
    "/tp_decoders.v1.Training/LoadState": TRAIN,
    "/tp_decoders.v1.Training/Export": TRAIN,
    "/tp_decoders.v1.Training/DropGradients": DROP,
    "/tp_decoders.v1.Training/GetTrainState": DROP,
    "/tp_decoders.v1.Control/GetServerInfo": ANYONE,
    "/tp_decoders.v1.Control/GetModelInfo": ANYONE,
    "/tp_decoders.v1.Control/GetLoad": ANYONE,
    "/tp_decoders.v1.Control/Abort": ABORT,
    "/tp_decoders.v1.Control/Drain": CONTROL,
    "/tp_decoders.v1.Control/Restart": CONTROL,
}
OPEN = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection."
METRICS = "/metrics"
"""Not a gRPC method but a path of the metrics' own port, which asks at the same gate."""


def needed(method: str) -> frozenset[Role]:
    """The roles of which one is needed."""
    if method == METRICS:
        return OBSERVE | CONTROL
    return CONTROL if method.startswith(REFLECTION) else ROLES.get(method, frozenset())


class Gate:
    """Lets a call in or raises. Without a token file everybody may call everything, and has no account."""

    def __init__(self, tokens: TokenFile | None, accounts: Accounts | None = None) -> None:
        self._tokens = tokens
        self._accounts = accounts or Accounts()

    def enter(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Account | None:
        """The caller's account; NotAuthenticated, NotPermitted or RateLimited otherwise."""
        if self._tokens is None or method.startswith(OPEN):
            return None
        grant = self._tokens.find(_bearer(metadata))
        if grant is None:
            raise NotAuthenticated("this token is unknown here, or has expired; ask whoever runs the server for one")
        roles = needed(method)
        if not roles & grant.roles:
            has, needs = (" or ".join(sorted(some)) or "none" for some in (grant.roles, roles))
            raise NotPermitted(f"token {grant.name!r} is for {has}; {method} needs {needs}")
        account = self._accounts.of(grant)
        account.count_call()
        return account


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The one token of a call's metadata."""
    given = [value for key, value in metadata if key == "authorization"]
    if len(given) != 1 or not isinstance(given[0], str):
        raise NotAuthenticated("this server asks for one token; send metadata authorization: Bearer TOKEN")
    scheme, token = given[0][: len(SCHEME)], given[0][len(SCHEME) :].strip()
    if scheme.lower() != SCHEME.lower() or not token:
        raise NotAuthenticated("the metadata authorization is not of the form: Bearer TOKEN")
    return token
