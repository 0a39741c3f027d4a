"""A hub on this machine: the few endpoints that huggingface_hub and datasets ask, over folders of a test."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Serves repositories: ``add("model", "me/tiny", folder)``; ``asked`` has what was downloaded, by its path,
    and ``requests`` counts all."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Path] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.requests = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, kind: str, repo: str, folder: Path) -> str:
        """One repository with one commit, which is returned."""
        self.repos[kind, repo] = folder
        return self.commit(repo)

    @staticmethod
    def commit(repo: str) -> str:
        """The only commit of a repository."""
        return hashlib.sha1(repo.encode()).hexdigest()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET  # noqa: N815 - names of http.server

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests += 1
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length) if length else b""
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            kind, repo, rest = parts[1][:-1], "/".join(parts[2:4]), parts[4:]
        else:
            kind = "dataset" if parts[0] == "datasets" else "model"
            parts = parts[1:] if kind == "dataset" else parts
            repo, rest = "/".join(parts[:2]), parts[2:]
        folder = self.repos.get((kind, repo))
        if folder is None:
            self._send(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[1:] and rest[0] != "paths-info" and rest[1] not in ("main", self.commit(repo)):
            self._send(request, 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["resolve"]:
            self._file(request, repo, folder, "/".join(rest[2:]))
        elif rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files(folder).items()]
            self._send(request, 200, {"id": repo, "sha": self.commit(repo), "siblings": siblings, "private": False})
        elif rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            self._send(request, 200, [one for one in tree(folder) if one["path"].startswith(below)])
        elif rest[:1] == ["paths-info"]:
            try:
                wanted = json.loads(body)["paths"]
            except ValueError:
                wanted = [unquote(pair.partition("=")[2]) for pair in body.decode().split("&") if "paths" in pair]
            self._send(request, 200, [one for one in tree(folder) if one["path"] in wanted])
        else:
            self._send(request, 404, {"error": f"unknown: {request.path}"}, {})

    def _file(self, request: BaseHTTPRequestHandler, repo: str, folder: Path, name: str) -> None:
        if repo in self.gated:
            error = f"Access to {repo} is restricted"
            self._send(request, 403, {"error": error}, {"X-Error-Code": "GatedRepo"})
            return
        data = files(folder).get(name)
        if data is None:
            self._send(request, 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        if request.command == "GET":
            self.asked.append(f"{repo}/{name}")
        tag = hashlib.sha1(data).hexdigest()
        headers = {"X-Repo-Commit": self.commit(repo), "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        self._send(request, 200, data, headers)

    def _send(
        self, request: BaseHTTPRequestHandler, code: int, value: Any, headers: dict[str, str] | None = None
    ) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        request.send_response(code)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(name, text)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


def files(folder: Path) -> dict[str, bytes]:
    """Name -> contents of all files of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def tree(folder: Path) -> list[dict[str, Any]]:
    """Files as the hub lists them."""
    return [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files(folder).items()
    ]
