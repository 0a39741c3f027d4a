"""A server that misbehaves in the way that the first part of the path names."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DEEP = "[" * 50_000 + "]" * 50_000


def _completion(**changes: Any) -> dict[str, Any]:
    return {"choices": [{"text": "3", "message": {"content": "3"}, "finish_reason": "stop", **changes}], "model": "m"}


BODIES: dict[str, Any] = {
    "good": _completion(),
    "null": None,
    "list": [],
    "text": "text",
    "number": 10**400,
    "no-choices": {"choices": []},
    "choices-null": {"choices": None},
    "choices-text": {"choices": "abc"},
    "choices-numbers": {"choices": [1, 2]},
    "text-null": _completion(text=None, message={"content": None}),
    "text-list": _completion(text=[1], message={"content": [1]}),
    "text-number": _completion(text=5, message={"content": 5}),
    "text-deep": _completion(text={"a": {"b": []}}, message=[]),
    "escape": _completion(text="\x1b[31mred\x1b[0m\u202e", message={"content": "\x1b[31mred\x9b"}),
    "nul": _completion(text="a\0b", message={"content": "a\0b"}),
    "surrogate": _completion(text="\ud800", message={"content": "\udfff"}),
    "huge": _completion(text="x" * 2_000_000, message={"content": "y" * 2_000_000}),
    "finish": _completion(finish_reason=7),
    "finish-escape": _completion(finish_reason="\x1b[2J"),
    "usage": {**_completion(), "usage": {"prompt_tokens": "x", "completion_tokens": -5}},
    "usage-list": {**_completion(), "usage": []},
    "other-model": {**_completion(), "model": "\x1b[31mother"},
    "logprobs": _completion(logprobs={"token_logprobs": [5.0], "tokens": ["x"], "top_logprobs": None, "content": 3}),
    "logprobs-text": _completion(logprobs="x"),
    "error": {"error": {"message": "\x1b[31mno\x1b[0m", "type": 5, "code": []}},
    "error-text": {"error": "no"},
    "error-list": {"error": ["no"]},
    "many": {"choices": [_completion()["choices"][0]] * 3},
    "code": _completion(text="__import__('os').system('touch executed')"),
    "template": _completion(text="{{ cycler.__init__.__globals__.os.system('touch executed') }}"),
}
RAW: dict[str, bytes] = {
    "empty": b"",
    "torn": b'{"choices": [',
    "not-json": b"<html>\x1b[31mgateway</html>",
    "not-utf8": b"\xff\xfe\xfa",
    "nan": b'{"choices": [{"text": NaN}]}',
    "deep": DEEP.encode(),
    "long-number": b'{"choices": [{"text": ' + b"9" * 6000 + b"}]}",
    "twice": b'{"choices": [{"text": "1", "text": "2"}]}',
}
STATUS = {
    f"status-{code}": code for code in (201, 204, 301, 307, 400, 401, 403, 404, 413, 418, 429, 500, 502, 503, 599)
}
WAYS = ("closes", "slow", "drip", "retry-after", "loop", "headers", "bad-length")
MODELS: dict[str, Any] = {
    "models-null": None,
    "models-list": [],
    "models-text": {"data": "x"},
    "models-numbers": {"data": [1, None]},
    "models-none": {"data": []},
    "models-escape": {"data": [{"id": "\x1b[31mm"}, {"id": "n"}]},
    "models-id": {"data": [{"id": ["m"]}]},
    "models-many": {"data": [{"id": f"m{i}"} for i in range(5000)]},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        way = self.path.split("/")[1]
        self._send(200, json.dumps(MODELS.get(way, {"data": [{"id": "m"}]})).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        way = self.path.split("/")[1]
        if way in RAW or way in BODIES:
            self._send(200, RAW[way] if way in RAW else json.dumps(BODIES[way]).encode())
        elif way in STATUS:
            self._send(STATUS[way], b'{"error": {"message": "\\u001b[31mno"}}', {"Location": "/good/v1/completions"})
        elif way == "closes":
            self.close_connection = True
        elif way == "slow":
            time.sleep(3)
        elif way == "drip":
            self._drip()
        elif way == "retry-after":
            self._send(429, b"{}", {"Retry-After": "1e999"})
        elif way == "loop":
            self._send(302, b"", {"Location": self.path})
        elif way == "headers":
            self._send(200, b"{}", {f"X-{i}": "x" * 1000 for i in range(90)})
        elif way == "bad-length":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}")
        else:
            self._send(200, json.dumps(_completion()).encode())

    def _drip(self) -> None:
        """A byte each half second: no silence is long, and the whole never ends."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(60):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.5)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is right to."""


@contextmanager
def bad_server() -> Iterator[str]:
    """The address of a server on a free port, gone afterwards."""
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
