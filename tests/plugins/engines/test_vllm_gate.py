"""The gate in front of vLLM on a processor: who may run beside whom, and in which order."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import Any

import pytest

from harness_plugins.engines.vllm import gate as vllm_gate
from harness_plugins.engines.vllm.gate import Gate, several, wants_prompt_logprobs

SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions"}


class App:
    """Keeps each request until it is let go, and notes who ran beside whom."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.beside: list[set[str]] = []
        self.order: list[str] = []
        self.bodies: list[bytes] = []
        self.let_go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        asked = json.loads(body)
        self.running.append(asked["id"])
        self.order.append(asked["id"])
        self.beside.append(set(self.running))
        if asked.get("leaves"):
            await receive()
        else:
            await self.let_go.wait()
        await asyncio.sleep(0.001)
        self.running.remove(asked["id"])
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(gate: Gate, **body: Any) -> list[Any]:
    """One request, its body in two parts."""
    raw = json.dumps(body).encode()
    parts = deque(
        [
            {"type": "http.request", "body": raw[:5], "more_body": True},
            {"type": "http.request", "body": raw[5:], "more_body": False},
            {"type": "http.disconnect"},
        ]
    )
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.popleft()

    async def send(message: Any) -> None:
        sent.append(message)

    await gate(dict(SCOPE), receive, send)
    return sent


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def scores(name: str, model: str) -> dict[str, Any]:
    return {"id": name, "model": model, "echo": True, "logprobs": 1, "prompt": [1, 2]}


def test_models_take_turns_and_scores_run_alone() -> None:
    async def run() -> App:
        app = App()
        gate = Gate(app)
        asked = [
            {"id": "base1", "model": "base", "prompt": "x"},
            {"id": "base2", "model": "base", "prompt": "x"},
            {"id": "kind1", "model": "kind", "prompt": "x"},
            # Comes when another waits, so it waits as well: nobody waits for ever.
            {"id": "base3", "model": "base", "prompt": "x"},
            scores("score1", "kind"),
            {"id": "kind2", "model": "kind", "prompt": "x"},
            scores("score2", "kind"),
        ]
        tasks = []
        for body in asked:
            tasks.append(asyncio.ensure_future(ask(gate, **body)))
            await settle()
        assert app.running == ["base1", "base2"]
        app.let_go.set()
        await asyncio.gather(*tasks)
        return app

    app = asyncio.run(run())
    # kind2 joins kind1, which waited first; the scores come one by one.
    assert app.order == ["base1", "base2", "kind1", "kind2", "base3", "score1", "score2"]
    alone = {"base3": {"base3"}, "score1": {"score1"}, "score2": {"score2"}}
    for name, beside in zip(app.order, app.beside, strict=True):
        assert beside == alone.get(name, beside)
        assert len({one[:4] for one in beside}) == 1
    assert json.loads(app.bodies[0]) == {"id": "base1", "model": "base", "prompt": "x"}, "the body arrives whole"


def test_who_gives_up_holds_nobody_up() -> None:
    async def run() -> list[str]:
        app = App()
        gate = Gate(app)
        first = asyncio.ensure_future(ask(gate, id="base1", model="base"))
        await settle()
        second = asyncio.ensure_future(ask(gate, id="kind1", model="kind"))
        third = asyncio.ensure_future(ask(gate, id="rude1", model="rude"))
        await settle()
        second.cancel()
        await settle()
        app.let_go.set()
        await asyncio.gather(first, third)
        # One that is cancelled while it runs leaves as well.
        app.let_go.clear()
        fourth = asyncio.ensure_future(ask(gate, id="kind2", model="kind"))
        await settle()
        fourth.cancel()
        app.let_go.set()
        await ask(gate, id="base2", model="base")
        return app.order

    assert asyncio.run(run()) == ["base1", "rude1", "kind2", "base2"]


def test_the_next_waits_until_a_client_that_left_is_out_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    async def run() -> None:
        app = App()
        app.let_go.set()
        gate = Gate(app)
        monkeypatch.setattr(vllm_gate.asyncio, "sleep", note)
        await ask(gate, id="base1", model="base", leaves=True)
        assert vllm_gate.AFTERMATH in waited
        waited.clear()
        await ask(gate, id="base2", model="base")
        assert vllm_gate.AFTERMATH not in waited

    asyncio.run(run())


def test_what_cannot_run_alone_is_refused() -> None:
    async def run() -> tuple[list[Any], App]:
        app = App()
        return await ask(Gate(app), id="s", model="kind", echo=True, logprobs=1, prompt=[[1, 2], [3]]), app

    sent, app = asyncio.run(run())
    assert app.order == [] and sent[0]["status"] == 400
    assert "one prompt in a request (n = 1)" in json.loads(sent[1]["body"])["error"]["message"]


def test_other_requests_pass_at_once() -> None:
    async def run() -> list[str]:
        passed: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            passed.append(scope.get("path", scope["type"]))

        gate = Gate(app)
        for scope in ({"type": "lifespan"}, {"type": "http", "method": "GET", "path": "/health"}):
            await gate(scope, None, None)  # type: ignore[arg-type]
        return passed

    assert asyncio.run(run()) == ["lifespan", "/health"]


@pytest.mark.parametrize("body", ["not json", "[1]", "null", '{"model": null}', "[" * 5000])
def test_a_body_that_is_no_request_is_for_vllm_to_refuse(body: str) -> None:
    async def run() -> int:
        passed = 0

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal passed
            assert (await receive())["body"] == body.encode()
            passed += 1

        async def receive() -> Any:
            return {"type": "http.request", "body": body.encode()}

        await Gate(app)(dict(SCOPE), receive, None)  # type: ignore[arg-type]
        return passed

    assert asyncio.run(run()) == 1


@pytest.mark.parametrize(
    ("body", "wants"),
    [
        ({"echo": True, "logprobs": 1}, True),
        ({"echo": True, "logprobs": 0}, True),  # the token's own log-probability, without alternatives
        ({"echo": True}, False),
        ({"logprobs": 5}, False),  # of what is generated
        ({"prompt_logprobs": 0}, True),
        ({"prompt_logprobs": None}, False),
        ({"sampling_params": {"prompt_logprobs": 1}}, True),
    ],
)
def test_what_asks_for_log_probabilities_of_its_prompt(body: dict[str, Any], wants: bool) -> None:
    assert wants_prompt_logprobs(body) is wants


@pytest.mark.parametrize(
    ("body", "more"),
    [
        ({"prompt": [1, 2, 3]}, False),
        ({"prompt": ["a"]}, False),
        ({"prompt": ["a", "b"]}, True),
        ({"prompt": [[1], [2]]}, True),
        ({"prompt": []}, False),
        ({"messages": [[{"role": "user"}], [{"role": "user"}]]}, True),
        ({"messages": [{"role": "user"}, {"role": "user"}]}, False),
        ({"prompt": "a", "n": 2}, True),
    ],
)
def test_what_puts_several_prompts_into_a_batch(body: dict[str, Any], more: bool) -> None:
    assert several(body) is more
