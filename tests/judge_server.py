"""A judge behind HTTP, in this process: what it says to a question is a function of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Said = str | tuple[int, Any] | dict[str, Any]
"""Text of the reply; or status and body; or a whole chat completion."""


def completion(
    text: str, *, finish: str = "stop", usage: tuple[int, int] | None = (10, 2), **more: Any
) -> dict[str, Any]:
    """A chat completion of ten prompt tokens and two of the reply; None: the server does not count them."""
    body: dict[str, Any] = {"choices": [{"message": {"content": text}, "finish_reason": finish, **more}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return body


def first_token(tops: dict[str, float]) -> dict[str, Any]:
    """A completion of one token, with the log-probabilities of these."""
    listed = [{"token": token, "logprob": value} for token, value in tops.items()]
    best = max(listed, key=lambda entry: entry["logprob"])
    return completion(best["token"], finish="length", logprobs={"content": [{**best, "top_logprobs": listed}]})


@dataclass
class JudgeServer:
    """Where it listens, what it was asked, and what it says (to a request's body and its number, from 1 for each)."""

    url: str
    say: Callable[[dict[str, Any], int], Said] = lambda body, attempt: "nothing in particular"
    models: tuple[str, ...] = ("stub-judge",)
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of one reply."""
        with self.lock:
            self.asked.append(body)
            name = json.dumps(body, sort_keys=True)
            attempt = self.seen[name] = self.seen.get(name, 0) + 1
        said = self.say(body, attempt)
        if isinstance(said, tuple):
            return said
        return 200, completion(said) if isinstance(said, str) else said


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """A server on a free port of this machine, gone afterwards."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            """Silent."""

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": name} for name in judge.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if judge.key is not None and self.headers.get("Authorization") != f"Bearer {judge.key}":
                self._send(401, {"error": {"message": "no such key"}})
            else:
                self._send(*judge.answer(body))

        def _send(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hung up is what some tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    judge = JudgeServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
