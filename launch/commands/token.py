"""`tp-decoders token`: makes a token, writes it where only its owner reads it, and its digest into the server's file.

The token itself is never printed: the client's file is handed to whoever will use it. A running server sees the new
entry at its next call.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
from pathlib import Path

from cluster.access.token_file import LIMITS, Role, digest_of, parse_grants, read_grants
from parallel.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="who will use it: the name in messages")
    parser.add_argument("--roles", required=True, help=f"one or more of {','.join(Role)}, with commas")
    parser.add_argument("--add-to", required=True, metavar="FILE", help="the server's token file; made if need be")
    parser.add_argument("--out", metavar="FILE", help="where the token goes (default NAME.token)")
    parser.add_argument("--requests-per-second", type=float, metavar="N", help="default: no limit")
    parser.add_argument("--tokens-in-flight", type=int, metavar="N", help="of all its open calls (default: no limit)")
    parser.add_argument("--calls", type=int, metavar="N", help="open at once (default: the server's limit)")
    parser.add_argument("--weight", type=float, metavar="N", help="of the engine, beside others' (default: 1)")
    parser.add_argument("--max-priority", type=int, metavar="N", help="levels of priority (default: 10; control: all)")


def run(args: argparse.Namespace) -> int:
    if not NAME.fullmatch(args.name):
        raise ConfigError(f"the name is {args.name!r}; give 1 to 64 letters, digits, - and _")
    server, client = Path(args.add_to).expanduser(), Path(args.out or f"{args.name}.token").expanduser()
    try:
        before = server.read_text(encoding="utf-8") if server.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--add-to {server} cannot be read ({error}); give the server's token file") from error
    if before and args.name in {grant.name for grant in read_grants(str(server))}:
        raise ConfigError(f"{server} has a token named {args.name!r}; remove that entry first, or take another name")
    token = secrets.token_urlsafe(32)
    text = (before.rstrip("\n") + "\n\n" if before else "") + _entry(args, token)
    parse_grants(text.encode(), str(server))  # the server's own rules
    draft = server.with_name(f".{server.name}.{os.getpid()}")
    try:
        _write(draft, text, f"--add-to {server}")
        _write(client, token + "\n", f"--out {client}")
        os.replace(draft, server)
    finally:
        draft.unlink(missing_ok=True)
    print(f"{client} holds the token {args.name!r} for {args.roles}; {server} its digest")
    return 0


def _entry(args: argparse.Namespace, token: str) -> str:
    roles = ", ".join(f'"{role.strip()}"' for role in args.roles.split(","))
    lines = [f"[{args.name}]", f'sha256 = "{digest_of(token).hex()}"', f"roles = [{roles}]"]
    lines += [f"{limit} = {getattr(args, limit)}" for limit in LIMITS if getattr(args, limit) is not None]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str, given: str) -> None:
    """A new file, its owner's alone."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{given} cannot be written: {error.strerror}; give another place") from error
