"""Files of certificates, keys and tokens, read where they are used; secret ones only where no stranger could."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tp_decoders.access.errors import SettingsError

MAX_SECRET_BYTES = 1 << 20
BY_OTHERS = stat.S_IWGRP | stat.S_IRWXO
"""What nobody but the owner may do; the group may read, as mounted secrets of Kubernetes need it."""


def read_file(path: str, what: str, error: type[Exception] = SettingsError) -> bytes:
    """The bytes of a PEM file that need not be secret. `error` is raised where it cannot be used, here and below."""
    try:
        return Path(path).read_bytes()
    except OSError as fault:
        raise error(f"{what} {path} cannot be read: {fault.strerror}") from fault


def read_secret(path: str, what: str, error: type[Exception] = SettingsError) -> bytes:
    """The bytes of a file that only its owner may change and no stranger may read."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{what} {path} is no regular file")
            if found.st_mode & BY_OTHERS:
                mode = f"{stat.S_IMODE(found.st_mode):o}"
                raise error(f"{what} {path} can be read or changed by others (mode {mode}); run chmod 600 {path}")
            if found.st_uid not in (0, os.geteuid()):
                raise error(f"{what} {path} belongs to user {found.st_uid}; it must be this process's or root's")
            data = file.read(MAX_SECRET_BYTES + 1)
    except OSError as fault:
        raise error(f"{what} {path} cannot be read: {fault.strerror}") from fault
    if len(data) > MAX_SECRET_BYTES:
        raise error(f"{what} {path} is larger than {MAX_SECRET_BYTES} bytes; is it the right file?")
    return data
