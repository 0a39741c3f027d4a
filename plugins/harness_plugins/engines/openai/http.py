"""HTTP requests that end: within a time, however slowly a server drips its answer, and within a size."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 2**25
"""Longest answer that is read: log-probabilities of 131,072 tokens come to half of it."""


class TooLong(Exception):  # noqa: N818 - not an error of the program: one request's answer
    """The answer is longer than :data:`MOST_BYTES`."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    data: bytes
    retry_after: str | None


class Http:
    """One address. Requests come from any thread and run in one event loop, where a deadline can end them anywhere.

    A read timeout would begin anew with every byte.
    """

    def __init__(self, url: str, headers: Mapping[str, str], seconds: float, connections: int) -> None:
        import httpx

        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # Not compressed: a few bytes can unpack to any number.
        self._client = httpx.AsyncClient(
            base_url=url + "/", headers={"Accept-Encoding": "identity", **headers}, timeout=None, limits=limits
        )
        self._seconds = seconds
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        """Send, and read the whole answer.

        Raises:
            TimeoutError: it was not there in time.
            TooLong: it is too long.
            httpx.HTTPError: anything else that went wrong.
        """
        return asyncio.run_coroutine_threadsafe(self._exchange(method, path, body), self._loop).result()

    async def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None) -> Answer:
        async with asyncio.timeout(self._seconds), self._client.stream(method, path, json=body) as answer:
            data = bytearray()
            async for piece in answer.aiter_raw():
                data += piece
                if len(data) > MOST_BYTES:
                    raise TooLong
            return Answer(answer.status_code, bytes(data), answer.headers.get("retry-after"))

    def close(self) -> None:
        """Give up what is in flight and drop the connections."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()
