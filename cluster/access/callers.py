"""How a caller is named and on which terms it is served, the same for every protocol: by its token, else by the name in
its certificate, else by its address.
"""

from __future__ import annotations

from cluster.access.caller_limits import CALLER, TERMS, WHO, Account, Terms
from cluster.engine.request import Share


def name_of(account: Account | None, certificate: str | None) -> str:
    """Who is known to call; empty where nobody is. `certificate`: the common name in a verified one."""
    if account is not None:
        return f"token {account.grant.name!r}"
    return "" if certificate is None else f"certificate {certificate!r}"


def client_of(name: str, peer: str) -> str:
    """Whose calls are counted together: a name's, else an address's without the port ("ipv4:1.2.3.4:5678")."""
    return name or peer.rpartition(":")[0] or peer


def terms_of(account: Account | None, name: str, peer: str) -> Terms:
    """By name; without one by address, whose connections share what the address gets."""
    if account is not None:
        return Terms(share=Share(name, "", account.grant.weight), levels=account.grant.levels)
    return Terms(share=Share(name) if name else Share(client_of(name, peer), peer))


def answering(account: Account | None, name: str, peer: str) -> None:
    """From here on this context answers a call of this caller."""
    CALLER.set(account)
    WHO.set(name)
    TERMS.set(terms_of(account, name, peer))
