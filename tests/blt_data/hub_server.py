"""A hub on the loopback interface: listing, resolving and sending files as the real one does, and failing on demand.

Two servers, since the hub redirects downloads to another host: what is sent to the one must not all reach the other.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Place = Literal["info", "tree", "resolve", "cdn", "other"]


@dataclass(frozen=True, kw_only=True)
class Request:
    place: Place
    method: str
    path: str
    query: str
    range: str | None
    authorization: str | None


@dataclass(kw_only=True)
class Fault:
    """Something that goes wrong the next `times` times at one place."""

    place: Place
    times: int = 1
    status: int | None = None
    """Answer with this status."""
    retry_after: str | None = None
    cut_after: int | None = None
    """Send this many bytes of the body and cut the connection."""
    stall: float | None = None
    """Say nothing for some seconds, then cut the connection."""


@dataclass(kw_only=True)
class Hub:
    """What the servers serve, and what they were asked."""

    dataset: str
    """The repository, a dataset or, with `kind`, a model."""
    revisions: Mapping[str, Mapping[str, bytes]]
    """Commit to path to content."""
    branches: Mapping[str, str]
    """Branch or tag to commit."""
    kind: Literal["datasets", "models"] = "datasets"
    page: int = 1000
    """Entries on a page of a listing."""
    token: str | None = None
    """The token without which nothing is given, if the dataset is gated."""
    url: str = ""
    cdn: str = ""
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def api(self) -> str:
        """The beginning of the path of what is asked about the repository."""
        return f"/api/{self.kind}/{self.dataset}"

    @property
    def files_path(self) -> str:
        """The beginning of the path of its files."""
        return f"/datasets/{self.dataset}" if self.kind == "datasets" else f"/{self.dataset}"

    def asked(self, place: Place) -> list[Request]:
        """Return the requests at a place."""
        with self.lock:
            return [request for request in self.requests if request.place == place]

    def fault(self, place: Place) -> Fault | None:
        """Return what goes wrong now."""
        with self.lock:
            for fault in self.faults:
                if fault.place == place and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends."""
    servers = []
    for is_cdn in (False, True):
        server = _Server(("127.0.0.1", 0), _handler(hub, is_cdn))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        # Clients that have read enough, or were killed, hang up in the middle.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _handler(hub: Hub, is_cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub, Handler.is_cdn = hub, is_cdn
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    is_cdn: bool
    protocol_version = "HTTP/1.1"
    # Many small answers over one connection: without it each waits for the other side's acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        place = self._place(path)
        request = Request(
            place=place,
            method=self.command,
            path=urllib.parse.unquote(path),
            query=query,
            range=self.headers.get("Range"),
            authorization=self.headers.get("Authorization"),
        )
        with self.hub.lock:
            self.hub.requests.append(request)
        fault = self.hub.fault(place)
        if fault is not None and fault.stall is not None:
            threading.Event().wait(fault.stall)
            self._cut()
        elif fault is not None and fault.status is not None:
            extra = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
            self._send(fault.status, b"busy, and the token you sent is none of your log's business", extra)
        elif not self.is_cdn and self.hub.token and request.authorization != f"Bearer {self.hub.token}":
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})
        elif place == "other":
            self._send(404, b"{}", {})
        elif place == "cdn":
            self._content(path, query, fault)
        else:
            {"info": self._info, "tree": self._tree, "resolve": self._resolve}[place](path, query)

    def _place(self, path: str) -> Place:
        if self.is_cdn:
            return "cdn"
        if "/resolve/" in path:
            return "resolve"
        # The client asks for things of its own, too.
        return "other" if f"/{self.hub.kind}/" not in path else "tree" if "/tree/" in path else "info"

    def _files(self, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        revision = urllib.parse.unquote(revision)
        commit = self.hub.branches.get(revision, revision)
        files = self.hub.revisions.get(commit)
        return None if files is None else (commit, files)

    def _info(self, path: str, query: str) -> None:
        match = re.fullmatch(rf"{self.hub.api}(?:/revision/([^/]+))?", path)
        if match is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        found = self._files(match[1] or "main")
        if found is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in sorted(found[1])] if self.hub.kind == "models" else []
        listed = {"siblings": siblings} if siblings else {}
        self._send_json({"id": self.hub.dataset, "sha": found[0], "_id": "0", **listed})

    def _tree(self, path: str, query: str) -> None:
        match = re.fullmatch(rf"{self.hub.api}/tree/([^/]+)(?:/(.+))?", path)
        found = self._files(match[1]) if match else None
        if match is None or found is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        prefix = urllib.parse.unquote(match[2] or "")
        options = urllib.parse.parse_qs(query)
        start = int(options.get("cursor", ["0"])[0])
        entries = list(_entries(found[1], prefix))
        if not entries:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        stop = start + self.hub.page
        extra = {}
        if stop < len(entries):
            following = urllib.parse.urlencode({**{key: value[0] for key, value in options.items()}, "cursor": stop})
            extra["Link"] = f'<{self.hub.url}{path}?{following}>; rel="next"'
        self._send_json(entries[start:stop], extra)

    def _resolve(self, path: str, query: str) -> None:
        match = re.fullmatch(rf"{self.hub.files_path}/resolve/([^/]+)/(.+)", path)
        found = self._files(match[1]) if match else None
        name = urllib.parse.unquote(match[2]) if match else ""
        if found is None or name not in found[1]:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        commit, files = found
        digest = hashlib.sha256(files[name]).hexdigest()
        extra = {
            "Location": f"{self.hub.cdn}/{commit}/{urllib.parse.quote(name)}?X-Signature=s3cret&Expires=1",
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(files[name])),
            "X-Linked-ETag": f'"{digest}"',
            "ETag": f'"{digest}"',
            "Accept-Ranges": "bytes",
        }
        self._send(302, b"Found. Redirecting.", extra)

    def _content(self, path: str, query: str, fault: Fault | None) -> None:
        commit, _, name = urllib.parse.unquote(path).lstrip("/").partition("/")
        data = self.hub.revisions[commit][name]
        if "X-Signature=s3cret" not in query or self.headers.get("Authorization"):
            # Object stores refuse a request that is signed and authorised at once.
            self._send(400, b"only one auth mechanism allowed", {})
            return
        status, start, extra = 200, 0, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        stop = len(data)
        if wanted:
            status, start = 206, int(wanted[1])
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(status, data[start:stop], extra, cut_after=fault.cut_after if fault else None)

    def _send_json(self, value: object, extra: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(extra or {})})

    def _send(self, status: int, body: bytes, extra: Mapping[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body[:cut_after])
        except OSError:
            # The client has read enough.
            self.close_connection = True
            return
        if cut_after is not None and cut_after < len(body):
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def _entries(files: Mapping[str, bytes], prefix: str) -> Iterator[dict[str, object]]:
    folders = set()
    for path in sorted(files):
        if prefix and not path.startswith(f"{prefix}/"):
            continue
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder not in folders and len(folder) > len(prefix):
                folders.add(folder)
                yield {"type": "directory", "oid": commit_of(folder), "size": 0, "path": folder}
        entry: dict[str, object] = {"type": "file", "oid": commit_of(path), "size": len(files[path]), "path": path}
        if path.endswith((".parquet", ".zst", ".safetensors")):
            digest = hashlib.sha256(files[path]).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(files[path]), "pointerSize": 134}
        yield entry
