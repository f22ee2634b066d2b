"""Token files for tests: one token for each role, written with the mode that is asked of a user's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cluster.access.access_config import Access, Security
from cluster.access.token_file import Role

TOKENS = {role: f"a-secret-token-to-{role}-0123456789" for role in Role}


def secret_file(path: Path, text: str) -> str:
    path.touch(0o600)
    path.write_text(text)
    return str(path)


def entry(name: str, token: str, roles: list[str], more: str = "") -> str:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return f'[{name}]\nsha256 = "{digest}"\nroles = {roles!r}\n{more}\n'


def security(folder: Path, more: str = "") -> Security:
    """A server's, with a token named as its role for each role; `more` belongs to the one to generate."""
    text = "".join(
        entry(role, token, [str(role)], more if role is Role.GENERATE else "") for role, token in TOKENS.items()
    )
    return Security(token_file=secret_file(folder / "tokens.toml", text))


def access(folder: Path, token: str) -> Access:
    """A client's."""
    return Access(token_file=secret_file(folder / f"{hashlib.sha256(token.encode()).hexdigest()[:8]}.token", token))
