"""The engine kit passes a good engine, and fails a broken one for each rule, with the rule's words.

The good one is a bigram model in plain numpy: exact, fast, and nobody's product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import Field

from harness import AdapterInfo, Availability, Capabilities, Config, Engine, ModelInfo, Output, Request, Session
from harness.testing import check_engine, tiny_model

REASONS = {"prompt_embeds": "a bigram model has no embeddings"}


class BigramSession(Session):
    """log p(next | last token) from a seeded table, one table for the base and one for each adapter."""

    def __init__(self, model: ModelInfo, adapters: Sequence[AdapterInfo]) -> None:
        import numpy as np
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(f"{model.path}/tokenizer.json")
        size = self.tokenizer.get_vocab_size()
        self.tables: dict[str | None, Any] = {}
        for seed, name in enumerate([None, *(adapter.name for adapter in adapters)]):
            table = 3 * np.random.default_rng(seed).standard_normal((size, size))
            self.tables[name] = table - np.logaddexp.reduce(table, axis=1, keepdims=True)
        self.facts = {"device": "cpu"}

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        return [order[at : at + 2] for at in range(0, len(order), 2)]

    def run(self, requests: Sequence[Request]) -> list[Output]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Output:
        if request.adapter not in self.tables or request.control is not None:
            return Output(error="no such adapter or control")
        table = self.tables[request.adapter]
        if request.kind == "loglikelihood":
            pairs = list(
                zip(
                    (request.prompt_ids + request.continuation_ids)[-1 - len(request.continuation_ids) : -1],
                    request.continuation_ids,
                    strict=True,
                )
            )
            greedy = all(int(table[last].argmax()) == token for last, token in pairs)
            return Output(logprob=float(sum(table[last, token] for last, token in pairs)), is_greedy=greedy)
        assert request.decoding is not None
        ids: list[int] = []
        while len(ids) < request.decoding.max_new_tokens:
            ids.append(int(table[ids[-1] if ids else request.prompt_ids[-1]].argmax()))
        text = self.tokenizer.decode(ids)
        places = [place for stop in request.decoding.stop if (place := text.find(stop)) >= 0]
        cut = text[: min(places)] if places else text
        return Output(text=cut, token_ids=tuple(ids), finish="stop" if places else "length")


class Bigram(Engine):
    name = "bigram"
    summary = "a table of next tokens"
    session: type[BigramSession] = BigramSession

    class Config(Config):
        temperature: float = Field(1.0, gt=0, description="of the table (no unit)")

    def availability(self) -> Availability:
        return Availability(True)

    def capabilities(self, model: ModelInfo, options: Any) -> Capabilities:
        return Capabilities(generate=True, loglikelihood=True, max_adapters=1, max_adapter_rank=8, reasons=REASONS)

    def identity(self, options: Any) -> dict[str, Any]:
        return {"name": self.name, "version": "1"}

    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Any) -> Session:
        return self.session(model, adapters)


class HeavyBigram(Bigram):
    """Plans with a heavy package; found by name in a fresh process."""

    def capabilities(self, model: ModelInfo, options: Any) -> Capabilities:
        import vllm

        return super().capabilities(model, vllm and options)


def broken(**overrides: Any) -> Engine:
    engine: Engine = type("Broken", (Bigram,), overrides)()
    return engine


def session(**overrides: Any) -> Engine:
    return broken(session=type("BrokenSession", (BigramSession,), overrides))


def answers(change: Callable[[BigramSession, Request, Output], Output], kind: str = "") -> Engine:
    """An engine whose outputs (of one kind of request) are changed."""

    def answer(self: BigramSession, request: Request) -> Output:
        output = BigramSession.answer(self, request)
        return output if kind and request.kind != kind else change(self, request, output)

    return session(answer=answer)


def ask(self: BigramSession, request: Request, **changes: Any) -> Output:
    return BigramSession.answer(self, replace(request, **changes))


def clock(values: Sequence[Any]) -> Callable[[], Any]:
    remaining = iter(list(values) * 99)
    return lambda: next(remaining)


def jittery(kind: str, make: Callable[[Output, int], Output]) -> Engine:
    tick = clock(range(50))
    return answers(lambda self, request, output: make(output, tick()), kind)


def second_opening_differs() -> Engine:
    openings: list[int] = []

    def open_(self: Bigram, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Any) -> Session:
        openings.append(1)
        made = BigramSession(model, adapters)
        made.tables[None] = made.tables[None] if len(openings) == 1 else made.tables[None][::-1]
        return made

    return broken(open=open_)


def unplanned() -> Engine:
    tick = clock([1, 2])
    return session(batches=lambda self, requests: [[i] for i in range(len(requests))][:: 1 if tick() == 1 else -1])


def no_stop(self: BigramSession, request: Request, output: Output) -> Output:
    assert request.decoding is not None
    return ask(self, request, decoding=request.decoding.model_copy(update={"stop": ()}))


def keeps_stop(self: BigramSession, request: Request, output: Output) -> Output:
    assert request.decoding is not None
    return replace(output, text=output.text + request.decoding.stop[0]) if request.decoding.stop else output


def too_long(self: BigramSession, request: Request, output: Output) -> Output:
    assert request.decoding is not None
    more = request.decoding.max_new_tokens + 1
    return ask(self, request, decoding=request.decoding.model_copy(update={"max_new_tokens": more}))


def mean_logprob(self: BigramSession, request: Request, output: Output) -> Output:
    assert output.logprob is not None
    return replace(output, logprob=output.logprob / len(request.continuation_ids))


def ignores(name: str) -> Engine:
    def answer(self: BigramSession, request: Request) -> Output:
        known = request.adapter in self.tables
        changes: dict[str, Any] = (
            {"control": None} if name == "control" else {"adapter": request.adapter if known else None}
        )
        return ask(self, request, **changes)

    return session(answer=answer)


def test_a_good_engine_passes(tmp_path: Path) -> None:
    check_engine(Bigram())
    check_engine(Bigram(), model=tiny_model(tmp_path / "other", seed=3), options={"temperature": 2.0})
    no_adapters = Capabilities(generate=True, reasons={**REASONS, "adapters": "none", "loglikelihood": "none"})
    check_engine(broken(capabilities=lambda self, model, options: no_adapters))
    only_scores = Capabilities(loglikelihood=True, reasons={**REASONS, "adapters": "none", "generate": "none"})
    check_engine(broken(capabilities=lambda self, model, options: only_scores))


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (broken(availability=lambda self: True), "`availability` returns an Availability."),
        (broken(availability=lambda self: Availability(False)), "not usable says why in `Availability.reason`"),
        (
            broken(availability=lambda self: Availability(False, "no such device")),
            "The kit runs where the engine can.\n  seen: not usable: no such device",
        ),
        (
            broken(capabilities=lambda self, model, options: Capabilities(reasons={})),
            "An engine can at least `generate` or `loglikelihood` for a model it accepts.",
        ),
        (
            broken(capabilities=lambda self, model, options: Capabilities(True, True, reasons=REASONS)),
            "`reasons` says why not, for each thing the engine cannot do.\n  seen: none for adapters",
        ),
        (
            broken(identity=lambda self, options: {"version": 1}),
            "`identity` holds the engine's name.\n  seen: name=None",
        ),
        (broken(open=lambda self, model, adapters, options: None), "`open` returns a harness.Session."),
        (
            session(batches=lambda self, requests: [[i] for i in range(1, len(requests))]),
            "names each request exactly once",
        ),
        (
            session(batches=lambda self, requests: [[0]] + [[i] for i in range(len(requests))]),
            "names each request exactly once",
        ),
        (session(batches=lambda self, requests: [[], [*range(len(requests))]]), "in groups that are not empty"),
        (
            session(batches=lambda self, requests: [[*range(len(requests))]] if requests else [[]]),
            "`batches` of no request is no batch.",
        ),
        (unplanned(), "`batches` is a function of the requests alone."),
        (
            session(run=lambda self, requests: BigramSession.run(self, requests)[:1]),
            "`run` returns one Output per request, in order.",
        ),
        (
            session(run=lambda self, requests: BigramSession.run(self, requests)[::-1]),
            "A batch's outputs are in the order of its requests",
        ),
        (
            answers(lambda self, request, output: output.text, "generate"),
            "`run` returns harness.Output objects.\n  seen: str",
        ),  # type: ignore[arg-type, return-value]
        (
            answers(lambda self, request, output: Output(error="busy")),
            "A plain request is answered without an error.\n  seen: 'busy'",
        ),
        (
            answers(lambda self, request, output: replace(output, finish=None), "generate"),
            "`finish` is 'stop' or 'length'.",
        ),
        (answers(too_long, "generate"), "An answer has at most `max_new_tokens` tokens.\n  seen: 9 of 8"),
        (answers(no_stop, "generate"), "A stop text ends the answer and is no part of it."),
        (answers(keeps_stop, "generate"), "A stop text ends the answer and is no part of it."),
        (
            answers(lambda self, request, output: replace(output, finish="length"), "generate"),
            "meets a stop text has finish='stop'",
        ),
        (
            jittery("generate", lambda output, tick: replace(output, text=output.text + "!" * tick)),
            "Greedy answers are the same when asked again.",
        ),
        (
            answers(lambda self, request, output: replace(output, text=output.text[::-1]), "generate"),
            "fewer tokens is the beginning of the longer",
        ),
        (
            answers(lambda self, request, output: replace(output, token_ids=()), "generate"),
            "an answer has one token in `token_ids`",
        ),
        (
            answers(lambda self, request, output: replace(output, logprob=0.5), "loglikelihood"),
            "finite and at most 0 (the logarithm of a probability).\n  seen: 0.5",
        ),
        (answers(lambda self, request, output: replace(output, logprob=None), "loglikelihood"), "finite and at most 0"),
        (
            answers(lambda self, request, output: replace(output, logprob=float("-inf")), "loglikelihood"),
            "finite and at most 0",
        ),
        (
            answers(lambda self, request, output: replace(output, is_greedy=None), "loglikelihood"),
            "`is_greedy` is True or False.",
        ),
        (
            answers(lambda self, request, output: replace(output, is_greedy=False), "loglikelihood"),
            "greedy generation chose has is_greedy=True",
        ),
        (
            answers(lambda self, request, output: replace(output, is_greedy=True), "loglikelihood"),
            "did not choose has is_greedy=False",
        ),
        (answers(mean_logprob, "loglikelihood"), "log p(ab|x) = log p(a|x) + log p(b|xa), in nats."),
        (
            ignores("adapter"),
            "A request with an unknown `adapter` is answered with Output(error=...), never as if it had none.",
        ),
        (ignores("control"), "A request with an unknown `control` is answered with Output(error=...)"),
        (
            answers(lambda self, request, output: ask(self, request, adapter=None) if output.error is None else output),
            "open `adapter` is answered by base + adapter",
        ),
        (second_opening_differs(), "After `close` the model opens again and the base answers as before"),
    ],
)
def test_a_broken_engine_fails(engine: Engine, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_engine(engine)
    assert words in str(caught.value)


def test_planning_must_stay_light(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vllm: only its name matters here."""
    (tmp_path / "vllm.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    with pytest.raises(AssertionError, match=r"fresh process without heavy imports\.\n  seen: they imported vllm$"):
        check_engine(HeavyBigram())


def test_facts_must_be_json() -> None:
    def open_(self: Bigram, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Any) -> Session:
        made = BigramSession(model, adapters)
        made.facts = {"device": object()}
        return made

    with pytest.raises(AssertionError, match=r"`Session.facts` are plain JSON values"):
        check_engine(broken(open=open_))


def test_refusing_loudly_is_not_ignoring() -> None:
    def answer(self: BigramSession, request: Request) -> Output:
        if request.control is not None:
            raise ValueError("no conditioning")
        return BigramSession.answer(self, request)

    check_engine(session(answer=answer))


def test_the_session_is_closed_when_a_rule_is_broken() -> None:
    closed: list[int] = []
    engine = session(close=lambda self: closed.append(1), batches=lambda self, requests: [])
    with pytest.raises(AssertionError, match="names each request exactly once"):
        check_engine(engine)
    assert closed == [1]


def test_who_claims_embeddings_puts_them_in() -> None:
    """One that answers as if there were no control, and one that says it knows none."""

    def deaf(self: BigramSession, request: Request) -> Output:
        known = request.control in (None, "first", "second")
        return BigramSession.answer(self, replace(request, control=None) if known else request)

    claims = {"capabilities": lambda self, model, options: replace(Bigram.capabilities(self, model, options), **EMBEDS)}
    rule = "A `control` whose virtual tokens are embeddings of real tokens is answered as those tokens are"
    for answer in (deaf, BigramSession.answer):
        made = type("Broken", (BigramSession,), {"answer": answer})
        engine = broken(open=lambda self, model, adapters, options, made=made: made(model, adapters), **claims)
        with pytest.raises(AssertionError) as caught:
            check_engine(engine)
        assert rule in str(caught.value)


EMBEDS = {"prompt_embeds": True}
