"""The flags of commands that call a server: whom to trust, what to show, which token. From arguments to an Access."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.access.access_config import Access

FILES = {
    "tls_ca": "trust servers whose certificate this CA signed (PEM); the connection is then encrypted",
    "tls_cert": "this client's certificate (PEM), for servers that ask for one",
    "tls_key": "its key",
    "token_file": "a file that holds this client's token and that only you can read",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to reach a protected server")
    group.add_argument("--tls", action="store_true", help="encrypt; whom to trust: --tls-ca, else the public CAs")
    for name, words in FILES.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar="FILE", help=words)
    group.add_argument("--tls-server-name", metavar="NAME", help="the name in its certificate, if not the address's")
    group.add_argument(
        "--insecure-send-token", action="store_true", help="send the token to another machine without encryption"
    )


def access_of(args: argparse.Namespace) -> Access:
    """What the arguments give; what does not go together is a ConfigError."""
    files = {name: getattr(args, name) for name in FILES if getattr(args, name) is not None}
    return Access(
        tls=args.tls,
        tls_server_name=args.tls_server_name,
        plain_token=args.insecure_send_token,
        **{name: str(Path(path).expanduser()) for name, path in files.items()},
    )
