"""A gate in front of vLLM's server on a CPU, where two of its bugs would give wrong answers or none (vLLM 0.32).

With adapters loaded, a batch that holds requests of the base and of an adapter answers the base's with the adapter, in
silence; and log-probabilities of a prompt beside any other request end the engine. So requests of one model run side
by side, those of another wait for their turn, and one that asks for log-probabilities of its prompt runs alone.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

AFTERMATH = 0.5
"""Seconds until a request whose client has gone has left vLLM's batch, too: it is taken out a little later."""


class Turns:
    """Who may run: any number with one key, first come, first served; a key None is shared with nobody."""

    def __init__(self) -> None:
        self._running = 0
        self._key: str | None = None
        self._waiting: deque[tuple[str | None, asyncio.Future[None]]] = deque()

    async def enter(self, key: str | None) -> None:
        """Wait for this request's turn."""
        if not self._running or (key is not None and key == self._key and not self._waiting):
            self._key = key
            self._running += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((key, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            else:
                self._waiting.remove((key, turn))
            raise

    def leave(self) -> None:
        """This request is through; the first that waits comes next, with all that wait for the same model."""
        self._running -= 1
        if self._running or not self._waiting:
            return
        key, turn = self._waiting.popleft()
        admitted = [turn]
        if key is not None:
            admitted += [one for other, one in self._waiting if other == key]
            self._waiting = deque(entry for entry in self._waiting if entry[0] != key)
        self._key = key
        self._running = len(admitted)
        for one in admitted:
            one.set_result(None)


class Gate:
    """ASGI middleware."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on when its turn has come; what cannot run safely is answered with 400."""
        if scope["type"] != "http" or scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        messages, body = await _read(receive)
        asked = _parsed(body)
        scores = wants_prompt_logprobs(asked)
        if scores and several(asked):
            await _refuse(send)
            return
        gone = False

        async def replay() -> Message:
            nonlocal gone
            if messages:
                return messages.popleft()
            message = await receive()
            gone |= message["type"] == "http.disconnect"
            return message

        await self._turns.enter(None if scores else str(asked.get("model")))
        try:
            await self._app(scope, replay, send)
        finally:
            try:
                if gone:
                    await asyncio.sleep(AFTERMATH)
            finally:
                self._turns.leave()


def wants_prompt_logprobs(asked: MutableMapping[str, Any]) -> bool:
    """Whether a request asks for log-probabilities of its prompt: vLLM's own field, or OpenAI's echo with logprobs."""
    if _wanted(asked.get("prompt_logprobs")):
        return True
    parameters = asked.get("sampling_params")
    if isinstance(parameters, dict) and wants_prompt_logprobs(parameters):
        return True
    return bool(asked.get("echo")) and _wanted(asked.get("logprobs"))


def _wanted(count: Any) -> bool:
    # 0 asks for the tokens' own without alternatives.
    return count is not None and count is not False


def several(asked: MutableMapping[str, Any]) -> bool:
    """Whether a request puts more than one prompt, or one more than once, into a batch."""
    prompt, messages = asked.get("prompt"), asked.get("messages")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        prompts = max(prompts, len(messages))
    return prompts > 1 or any(isinstance(asked.get(key), int) and asked[key] > 1 for key in ("n", "best_of"))


async def _read(receive: Receive) -> tuple[deque[Message], bytes]:
    """The whole body, and the messages that brought it."""
    messages: deque[Message] = deque()
    body = b""
    while True:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body"):
            return messages, body


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


async def _refuse(send: Send) -> None:
    said = "on a CPU with adapters, log-probabilities of a prompt are given for one prompt in a request (n = 1)"
    content = json.dumps({"error": {"message": said, "type": "BadRequestError", "param": "prompt", "code": 400}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content.encode())).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": content.encode()})
