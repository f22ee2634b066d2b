"""What went wrong with the Hugging Face hub, in one line that says what to do."""

from __future__ import annotations

import errno

import requests
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FULL = (errno.ENOSPC, errno.EDQUOT)
BUSY = (408, 429)
NO_HUB = (requests.exceptions.InvalidJSONError, requests.exceptions.InvalidURL, requests.TooManyRedirects)
LOGIN = "set HF_TOKEN, or log in with `hf auth login`"


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed in a moment."""
    return is_unreachable(error) or _status(_cause(error)) in BUSY


def is_unreachable(error: Exception) -> bool:
    """Whether the hub is not there or is not well, rather than refusing."""
    cause = _cause(error)
    status = _status(cause)
    if status is not None:
        return status >= 500
    return isinstance(cause, requests.RequestException) and not isinstance(cause, NO_HUB)


def broke_off(error: Exception) -> bool:
    """Whether a transfer ended early, which huggingface_hub does not try again itself; it goes on where it stopped."""
    return isinstance(_cause(error), requests.exceptions.ChunkedEncodingError)


def explained(error: Exception, name: str, file: str | None = None) -> str:
    """One line. `file`: what was fetched of the repository; None where it was asked for its list of files."""
    cause, hub = _cause(error), constants.ENDPOINT
    what = name if file is None else f"{file} of {name}"
    status = _status(cause)
    if isinstance(cause, GatedRepoError):
        return f"{name} is gated: ask for access on {hub}/{name.partition('@')[0]}, then {LOGIN}"
    if isinstance(cause, DisabledRepoError):
        return f"{name} has been disabled on {hub}"
    if isinstance(cause, RevisionNotFoundError):
        repo, _, revision = name.partition("@")
        return f"{repo} on {hub} has no revision {revision or 'main'!r}; give a branch, a tag or a commit"
    if isinstance(cause, RepositoryNotFoundError) or (status == 404 and file is None):
        return f"{name} is no folder here and no repository on {hub}, or a private one: check the name, or {LOGIN}"
    if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        return f"{what} is not on {hub}, though it is listed; try again later"
    if status in (401, 403):
        return f"{hub} refuses {what} ({status}): it is private, or the token is wrong; {LOGIN}"
    if status is not None:
        return f"{hub} cannot give {what} now (HTTP status {status}); try again later"
    if isinstance(cause, (*NO_HUB, TypeError, LookupError, AttributeError)):
        return f"{hub} does not answer as a Hugging Face hub ({_first_line(cause)}); is HF_ENDPOINT right?"
    if isinstance(cause, requests.Timeout):
        return f"{what}: {hub} does not answer in time (HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT); try again"
    if isinstance(cause, requests.RequestException) and file is not None:
        return (
            f"{what}: the transfer from {hub} broke off ({_reason(cause)}); the same command goes on where it stopped"
        )
    if isinstance(cause, requests.RequestException):
        return (
            f"{what} is no folder here, and {hub} cannot be reached ({_reason(cause)}); check the name, the "
            "network and proxies (HTTPS_PROXY, HF_ENDPOINT)"
        )
    if isinstance(cause, OSError) and cause.errno in FULL:
        return f"{what} cannot be kept in {constants.HF_HUB_CACHE}: the disk is full; make room, or set HF_HUB_CACHE"
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"{what} cannot be kept in {constants.HF_HUB_CACHE} ({cause.strerror}); set another HF_HUB_CACHE"
    return f"{what} cannot be fetched from {hub}: {_first_line(cause)}"


def _cause(error: BaseException) -> BaseException:
    """What made huggingface_hub look into its cache in vain, where that is what failed."""
    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return response.status_code if isinstance(error, requests.HTTPError) and response is not None else None


def _reason(error: BaseException) -> str:
    """The innermost reason, which urllib3 wraps several times."""
    inner = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)
    return _first_line(inner).rpartition(">: ")[2] or type(error).__name__


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
