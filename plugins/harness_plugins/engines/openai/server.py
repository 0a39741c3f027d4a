"""HTTP to an OpenAI-compatible server: attempts, waits, and errors that a person can read.

The key is read from the environment when the server is opened; it lives in the HTTP client only and is cut out of
everything that a server says (:mod:`harness.core.secrecy`) before anything is made of that.
"""

from __future__ import annotations

import email.utils
import json
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from harness import LOGPROB_ROUNDING, UserError, check_variable, cleaned, nearest, read_secret, refuse_credentials
from harness_plugins.engines.openai.http import MOST_BYTES, Answer, Http, TooLong

AGAIN = frozenset({408, 409, 425, 429})
LEAST_LOGPROB = -1e6
"""Nats; what is below is no probability but a mask: servers that may not say minus infinity send -9,999."""
_SNAPSHOT = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{8}|\d{3,4})$")


def complete_url(address: str) -> str:
    """The address without a trailing slash; ``/v1`` is added to a bare host."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1", query="", fragment=""))


def shown_url(address: str) -> str:
    """The address without user, password and query."""
    parts = urlsplit(complete_url(address))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def check_address(address: str, variable: str, where: str, key: str) -> None:
    """Whether address and key are given as they must be: the key in an environment variable, and nowhere else.

    Raises:
        UserError: the address is none or holds credentials, or the variable's name is none.
    """
    check_variable(variable, key)
    refuse_credentials(address, where, variable)
    try:
        _ = urlsplit(address).port
    except ValueError as error:
        raise UserError(
            where, f"{address!r} is no address: {error}", "Give for example http://localhost:8000/v1."
        ) from None


class Refused(Exception):  # noqa: N818 - not an error of the program: one request's answer
    """The server answered that it will not do this one request; ``passing``: another time it may."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


class Failed(Exception):  # noqa: N818
    """An attempt failed in a way that another attempt may mend; ``wait`` is what the server asked for (seconds)."""

    def __init__(self, reason: str, wait: float | None = None, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.unreachable = wait, unreachable


class Stopped(Exception):  # noqa: N818
    """The batch was given up while this request waited."""


@dataclass(frozen=True)
class Names:
    """What messages call the thing that asks, and its options for model name, key and address."""

    title: str = "engine openai"
    model: str = "engine.model"
    key: str = "engine.api_key_env"
    address: str = "engine.base_url"
    alias: str = "engine.answers_as"
    others: str = "engine.base_url, engine.endpoint and engine.model"


class Server:
    """HTTP to one address: attempts, waits, and errors that a person can read."""

    def __init__(self, url: str, options: Any, names: Names | None = None) -> None:
        self.options, self.names = options, names or Names()
        self.shown = shown_url(url)
        self._roots: dict[str, str] = {}
        key = read_secret(options.api_key_env, self.names.key)
        self._has_key = bool(key)
        # A value of two words names its own scheme: "Basic ...".
        headers = {"Authorization": key if " " in key else f"Bearer {key}"} if key else {}
        self._http = Http(url, headers, options.timeout, options.concurrency)

    def close(self) -> None:
        """Drop the connections, and with them the key."""
        self._http.close()

    def settle_model(self) -> str:
        """The model's name: as configured, else the only one that the server lists."""
        try:
            listed = self._listed()
        except Failed as failure:
            if failure.unreachable:
                raise self.unreachable(failure) from None
            listed = None
        if self.options.model is not None:
            if listed and self.options.model not in listed:
                raise self.unknown_model(listed)
            return str(self.options.model)
        if listed is not None and len(listed) == 1:
            return listed[0]
        seen = f"it lists {', '.join(listed)}" if listed else "it lists none"
        raise UserError(
            self.names.model,
            f"which model of {self.shown}? {seen}",
            f"Set {self.names.model.rpartition(', ')[2]} to its name.",
        )

    def _listed(self) -> list[str] | None:
        """Names that ``GET /models`` gives; None where the server has no such list."""
        try:
            entries = self._once("GET", "models", None)["data"]
            # vLLM: one model under several names, of which it answers with the first, has one root.
            self._roots = {str(entry["id"]): entry["root"] for entry in entries if isinstance(entry.get("root"), str)}
            return [str(entry["id"]) for entry in entries]
        except (Refused, LookupError, TypeError, AttributeError):
            return None

    def post(self, path: str, body: Mapping[str, Any], stop: threading.Event, digest: str) -> dict[str, Any]:
        """One request with all its attempts.

        Raises:
            Refused: the server will not answer this request, or not after every attempt.
            UserError: no request at all can succeed.
            Stopped: ``stop`` was set.
        """
        for attempt in range(self.options.retries + 1):
            try:
                answer = self._once("POST", path, body)
                self._refuse_another(str(body["model"]), answer.get("model"))
                return answer
            except Failed as failure:
                if attempt == self.options.retries:
                    if failure.unreachable:
                        raise self.unreachable(failure) from None
                    raise Refused(f"{failure} ({attempt + 1} attempts)", passing=True) from None
                wait = self.delay(attempt, digest)
                if stop.wait(min(self.options.max_wait, max(wait, failure.wait or 0.0))):
                    raise Stopped from None
        raise AssertionError("unreachable")

    def _refuse_another(self, asked: str, answered: object) -> None:
        """Refuse an answer of another model; a server that does not name its model is believed."""
        if not isinstance(answered, str) or not answered or answered == self.options.answers_as:
            return
        root = self._roots.get(asked)
        if not same_model(asked, answered) and (root is None or root not in (answered, self._roots.get(answered))):
            seen = f"{self.clean(asked)!r} was asked and {self.clean(answered)!r} answered"
            raise Refused(f"{seen} (if they are the same, set {self.names.alias} to the latter)", passing=True)

    def delay(self, attempt: int, digest: str) -> float:
        """Seconds before the next attempt: ``backoff * 2**attempt``, times 0.5 to 1 drawn from the request's digest."""
        share = 0.5 + random.Random(f"{digest}/{attempt}").random() / 2
        return float(min(self.options.max_wait, self.options.backoff * 2**attempt * share))

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        import httpx

        try:
            answer = self._http.request(method, path, body)
        except httpx.ConnectError as error:
            raise Failed(self.clean(str(error) or "no connection"), unreachable=True) from None
        except TimeoutError:
            raise Failed(f"no answer within {self.options.timeout:g} s") from None
        except TooLong:
            raise Refused(f"the server's answer is longer than {MOST_BYTES >> 20} MiB", passing=True) from None
        except httpx.HTTPError as error:
            raise Failed(self.clean(f"{type(error).__name__}: {error}")) from None
        if answer.status == 200:
            value = _parsed(answer)
            if not isinstance(value, dict):
                raise Failed("the server's answer is not JSON")
            return value
        self._sort_out(answer.status, self._said(answer), answer.retry_after, path)
        raise AssertionError("unreachable")

    def _sort_out(self, status: int, said: str, retry_after: str | None, path: str) -> None:
        """Raise what a status other than 200 means."""
        if status in (401, 403):
            held = "holds no key" if not self._has_key else "holds a key that it does not accept"
            raise UserError(
                f"{self.names.title}, {self.shown}",
                f"the server refuses access ({status}): {said}",
                f"The environment variable {self.options.api_key_env} {held}; set it, or {self.names.key}.",
            )
        if status == 404 and path != "models":
            listed = self._listed_safely()
            if listed and self.options.model is not None and self.options.model not in listed:
                raise self.unknown_model(listed)
            names = f" The server lists {', '.join(listed)}." if listed else ""
            raise UserError(
                f"{self.names.title}, {self.shown}",
                f"the server does not know /{path} or the model (404): {said}",
                f"Check {self.names.others}.{names}",
            )
        if "insufficient_quota" in said:
            raise UserError(
                f"{self.names.title}, {self.shown}",
                f"the account is spent ({status}): {said}",
                "Add credit, then go on.",
            )
        if status in AGAIN or status >= 500:
            raise Failed(f"HTTP {status}: {said}", seconds(retry_after))
        raise Refused(f"HTTP {status}: {said}")

    def _listed_safely(self) -> list[str] | None:
        try:
            return self._listed()
        except Failed:
            return None

    def _said(self, answer: Answer) -> str:
        """The server's own words, short, without the key."""
        value = _parsed(answer)
        error = value.get("error", value) if isinstance(value, dict) else None
        if isinstance(error, dict):
            error = f"{error.get('message', error)} {error.get('code') or ''}"
        return self.clean(error if isinstance(error, str) else answer.data.decode(errors="replace"))

    def clean(self, text: str) -> str:
        """One short line in which no key is."""
        return " ".join(str(cleaned(text)).split())[:300]

    def unreachable(self, failure: Failed) -> UserError:
        """Nobody listens at the address."""
        return UserError(
            f"{self.names.title}, {self.shown}",
            f"cannot be reached: {failure}",
            f"Start it, or mend {self.names.address}.",
        )

    def unknown_model(self, listed: Sequence[str]) -> UserError:
        """The server does not list the model."""
        close = nearest(self.options.model, listed)
        guess = f"Did you mean {close[0]!r}? " if close else ""
        return UserError(
            self.names.model,
            f"{self.shown} does not serve {self.options.model!r}",
            f"{guess}The server lists {', '.join(listed)}.",
        )


def _parsed(answer: Answer) -> Any:
    """The answer as JSON, without secrets; None: it is none."""
    try:
        return cleaned(json.loads(answer.data))
    except (ValueError, RecursionError):
        return None


def mapping(value: object) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one: a server may put anything anywhere."""
    return value if isinstance(value, dict) else {}


def nats(value: object) -> float:
    """A log-probability as a server gave it.

    Raises:
        Refused: it is no number, not finite, or positive beyond rounding.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused("the server left out log-probabilities", passing=True)
    if not LEAST_LOGPROB < value <= LOGPROB_ROUNDING:
        raise Refused(f"the server gave {value!r:.20} as a log-probability", passing=True)
    return float(value)


def same_model(asked: str, answered: str) -> bool:
    """Whether a server's name for the model that answered can be one of the model that was asked for.

    The same path or its end (``org/name`` and ``name``), ``:latest``, and a dated snapshot of it (``gpt-4o`` is
    answered by ``gpt-4o-2024-08-06``), without regard to case; a dated name that was asked for stands for itself.
    """
    one, other = (name.rstrip("/").removesuffix(":latest").lower() for name in (asked, answered))
    return any(
        f"/{first}".endswith(f"/{second}") or f"/{second}".endswith(f"/{first}")
        for first, second in ((one, other), (one.removesuffix("-latest"), _SNAPSHOT.sub("", other)))
    )


def seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, in seconds from now (RFC 9110, 10.2.3: a number or a date)."""
    if not retry_after:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
