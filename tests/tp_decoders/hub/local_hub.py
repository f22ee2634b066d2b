"""A Hugging Face hub on this machine: the calls that huggingface_hub makes to read a model, served from folders.

Small files come as they are, .safetensors and .bin by a redirect to another path, as from the hub's storage. What is
asked is written down, and faults can be ordered: a status so many times, a delay, a token that is needed.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = (".safetensors", ".bin")


@dataclass
class LocalHub:
    """Repositories as {name: {commit: folder}}, with branches and tags as {name: {revision: commit}}."""

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    faults: dict[str, list[int]] = field(default_factory=dict)  # the end of a path: statuses of its next answers
    delay_s: float = 0.0
    short: dict[str, int] = field(default_factory=dict)  # the end of a path: how many of its next bodies end early
    strange: bytes | None = None  # the answer to everything, where this is no hub
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """Publishes a folder; its commit."""
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        self.repos.setdefault(name, {})[commit] = folder
        self.refs.setdefault(name, {})[revision] = commit
        return commit

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for."""
        return [
            line.rpartition("/")[2] for line in self.asked
            if line.startswith("GET /storage/") or (line.startswith("GET") and "/resolve/" in line)
        ]  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        """Answers until the end of the block; the same port when run again."""
        server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        time.sleep(hub.delay_s)
        if hub.strange is not None:
            return self._say(200, hub.strange)
        for end, statuses in hub.faults.items():
            if path.endswith(end) and statuses:
                return self._say(statuses.pop(0), b"something went wrong")
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._say(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        words = path.strip("/").split("/")
        if words[0] == "storage":
            return self._content(Path("/" + "/".join(words[1:])), {}, head)
        if words[:2] == ["api", "models"] and len(words) >= 4:
            return self._model("/".join(words[2:4]), "/".join(words[5:]) or "main")
        if len(words) >= 5 and words[2] == "resolve":
            return self._file("/".join(words[:2]), words[3], "/".join(words[4:]), head)
        return self._say(404, b"{}")

    def _commit(self, repo: str, revision: str) -> str | None:
        if repo not in self.hub.repos:
            self._say(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.hub.refs[repo].get(revision, revision)
        if commit not in self.hub.repos[repo]:
            self._say(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def _model(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision.replace("%2F", "/"))
        if commit is not None:
            folder = self.hub.repos[repo][commit]
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            siblings = [{"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size} for path in files]
            self._say(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())

    def _file(self, repo: str, revision: str, name: str, head: bool) -> None:
        commit = self._commit(repo, revision.replace("%2F", "/"))
        if commit is None:
            return None
        if repo in self.hub.gated:
            return self._say(403, b"{}", {"X-Error-Code": "GatedRepo"})
        path = self.hub.repos[repo][commit] / name
        if not path.is_file():
            return self._say(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        facts = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if not name.endswith(LARGE):
            return self._content(path, facts, head)
        linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(path.stat().st_size)}
        return self._say(302, b"", {**facts, **linked, "Location": f"{self.hub.endpoint}/storage{path}"})

    def _content(self, path: Path, facts: dict[str, str], head: bool) -> None:
        self._say(200, path.read_bytes(), facts, head)

    def _say(self, status: int, body: bytes, headers: dict[str, str] | None = None, head: bool = False) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD" and not head:
            self.wfile.write(body[: len(body) // 2] if self._ends_early() else body)

    def _ends_early(self) -> bool:
        end = next((end for end, left in self.hub.short.items() if left and self.path.endswith(end)), None)
        if end is not None:
            self.hub.short[end] -= 1
        return end is not None
