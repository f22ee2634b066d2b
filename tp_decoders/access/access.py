"""What a client brings: whom it trusts, its certificate, its token. Files are read when a connection is made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from tp_decoders.access.addresses import is_loopback
from tp_decoders.access.errors import SettingsError
from tp_decoders.access.private_files import read_secret

TOKEN, TOKEN_FILE, TLS_CA = "TP_DECODERS_TOKEN", "TP_DECODERS_TOKEN_FILE", "TP_DECODERS_TLS_CA"


@dataclass(frozen=True, kw_only=True)
class Access:
    """Whom a client trusts (tls without tls_ca: the public authorities), its certificate, its token. PEM files by path.

    What does not go together is a SettingsError.
    """

    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_server_name: str | None = None  # where the certificate names another host than the address does
    token_file: str | None = None
    plain_token: bool = False  # send the token without TLS to another machine, where everyone on the way can read it
    token: str | None = field(default=None, repr=False)  # itself; a file keeps it out of settings and printed values

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("a client's certificate and its key go together; give both or neither")
        if (self.tls_cert or self.tls_server_name) and not self.encrypted:
            raise SettingsError("a client's certificate and the server's name need TLS; give --tls-ca or --tls")
        if self.token is not None and self.token_file is not None:
            raise SettingsError("a token and a file of a token were given; give one of them")

    @staticmethod
    def of_environment() -> Access:
        """TP_DECODERS_TLS_CA, TP_DECODERS_TOKEN_FILE and TP_DECODERS_TOKEN, where they are set."""
        found = {name: os.environ.get(name) or None for name in (TOKEN, TOKEN_FILE, TLS_CA)}
        return Access(token=found[TOKEN], token_file=found[TOKEN_FILE], tls_ca=found[TLS_CA])

    @property
    def encrypted(self) -> bool:
        return self.tls or self.tls_ca is not None

    def bearer(self) -> str | None:
        """The token, where there is one; read anew from its file."""
        if self.token_file is None:
            token, what = self.token, "the token"
        else:
            what = f"the file of the token {self.token_file}"
            token = read_secret(self.token_file, "the file of the token").decode("ascii", "replace").strip()
        if token is not None and (token.split() != [token] or not token.isprintable() or not token.isascii()):
            raise SettingsError(f"{what} must hold one token and nothing else")
        return token

    def check_way(self, address: str, host: str) -> None:
        """Refuses to send a token in plain text to another machine."""
        brings = self.token is not None or self.token_file is not None
        if brings and not self.encrypted and not self.plain_token and not is_loopback(host):
            raise SettingsError(
                f"the token would go to {address} in plain text; give the server's CA (--tls-ca) or --tls, or say "
                "--insecure-send-token if something else encrypts the way there"
            )
