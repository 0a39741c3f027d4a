"""A judge behind a URL that anyone can check by hand: the better answer shares more words with its instruction.

    python judge.py [PORT]

It stands where a language model stands in earnest: AlpacaEval's ranking prompt comes in, a ranking goes out. Shares
are of the answer's distinct words, so that length alone wins nothing; of equal shares the shorter answer wins, then
the first.
"""

from __future__ import annotations

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "shared-words"
ASKED = re.compile(r'"instruction": """(.*?)""",', re.S)
ANSWER = re.compile(r'"answer": """(.*?)"""', re.S)


def words(text: str) -> set[str]:
    """Distinct words of three letters and more, in lower case."""
    return set(re.findall(r"[a-z]{3,}", text.lower()))


def ranking(prompt: str) -> str:
    """A reply to AlpacaEval's ranking prompt."""
    asked, answers = ASKED.search(prompt), ANSWER.findall(prompt)
    if asked is None or len(answers) != 2:
        return "This is no ranking prompt."
    known = words(asked[1])
    value = [(len(words(one) & known) / max(len(words(one)), 1), -len(one)) for one in answers]
    first = 1 if value[0] >= value[1] else 2
    ranks = [{"model": f"model_{first}", "rank": 1}, {"model": f"model_{3 - first}", "rank": 2}]
    return repr(ranks)


class Handler(BaseHTTPRequestHandler):
    """Chat completions, and the list of models."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """The list of models."""
        self._send({"data": [{"id": NAME}]})

    def do_POST(self) -> None:
        """One chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = ranking("\n".join(message["content"] for message in body["messages"]))
        message = {"role": "assistant", "content": text}
        self._send(
            {
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 0, "completion_tokens": 0},
            }
        )

    def _send(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 8731), Handler).serve_forever()
