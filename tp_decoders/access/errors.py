"""The errors of a client: one family, apart from the server's, since a client is installed without it."""

from __future__ import annotations


class ClientError(Exception):
    """Base of everything that the client raises on purpose."""


class SettingsError(ClientError, ValueError):
    """An address, a file, a token or an argument that cannot be used; nothing was sent."""
