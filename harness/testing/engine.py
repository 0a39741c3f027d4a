"""The contract of an engine, tried on a tiny model."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.contracts.engine import Availability, Capabilities, Engine, Session
from harness.core.records import AdapterInfo, ModelInfo, Output, Request, canonical
from harness.core.specs import Decoding, ModelSpec
from harness.models.inspect import inspect_adapter, inspect_model, open_tokenizer
from harness.testing.common import check_identity, check_plugin, demand, in_fresh_process, options_of
from harness.testing.tiny import SENTENCES, tiny_adapter, tiny_conditioning, tiny_model

ABSENT = "no-such-adapter-or-control"


@dataclass
class _Bench:
    """One engine under test, its model, and how exact it is asked to be."""

    engine: Engine
    options: Any
    model: ModelInfo
    able: Capabilities
    tolerance: float
    prompts: list[Request] = field(default_factory=list)

    def open(self, adapters: Sequence[AdapterInfo] = ()) -> Session:
        session = self.engine.open(self.model, adapters, self.options)
        demand(isinstance(session, Session), "`open` returns a harness.Session.", type(session).__name__)
        return session

    def ask(self, session: Session, requests: Sequence[Request]) -> list[Output]:
        """As the harness does it: plan batches over the whole list, run them, put the outputs back in order."""
        outputs: dict[int, Output] = {}
        for batch in session.batches(requests):
            answers = session.run([requests[i] for i in batch])
            aligned = isinstance(answers, list) and len(answers) == len(batch)
            demand(aligned, "`run` returns one Output per request, in order.", f"{answers!r} for {len(batch)} requests")
            outputs.update(zip(batch, answers, strict=True))
        return [outputs[i] for i in range(len(requests))]


def check_engine(
    engine: Engine,
    *,
    model: Path | str | ModelInfo | None = None,
    options: Mapping[str, Any] | None = None,
    tolerance: float = 0.01,
) -> None:
    """Try an engine against its contract: planning, generation, log-likelihoods, adapters, conditioning, reopening.

    Args:
        engine: the instance that the hook yields.
        model: folder, URL, or what ``inspect_model`` returned; a :func:`tiny_model` when absent.
        options: for the engine's Config.
        tolerance: greatest difference of two log-likelihoods that should be equal (nats).

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(engine, Engine)
    chosen = options_of(engine, options)
    check_identity(engine.identity(chosen), engine.identity(chosen))
    named = engine.identity(chosen).get("name")
    demand(named == engine.name, "`identity` holds the engine's name.", f"name={named!r}")
    with tempfile.TemporaryDirectory() as scratch:
        own = tiny_model(Path(scratch) / "tiny")
        info = model if isinstance(model, ModelInfo) else inspect_model(ModelSpec(model=str(model or own)))
        able = _capabilities(engine, info, chosen)
        bench = _Bench(engine, chosen, info, able, tolerance, _prompts(info, own))
        session = bench.open()
        try:
            first = _check_session(bench, session)
        finally:
            session.close()
        adapters = []
        if able.max_adapters > 0:
            folder = tiny_adapter(Path(scratch) / "adapter", info.path) if model is None else None
            adapters = [inspect_adapter(str(folder), info)] if folder else []
        session = bench.open(adapters)
        try:
            _check_reopened(bench, session, first, adapters)
        finally:
            session.close()
        if able.prompt_embeds and model is None:
            _check_embeds(bench, Path(scratch))


def _capabilities(engine: Engine, info: ModelInfo, options: Any) -> Capabilities:
    available = engine.availability()
    demand(isinstance(available, Availability), "`availability` returns an Availability.", repr(available))
    told = available.usable or bool(available.reason)
    demand(told, "An engine that is not usable says why in `Availability.reason`.", repr(available))
    demand(available.usable, "The kit runs where the engine can.", f"not usable: {available.reason}")
    able = engine.capabilities(info, options)
    demand(isinstance(able, Capabilities), "`capabilities` returns a Capabilities.", repr(able))
    useful = able.generate or able.loglikelihood
    demand(useful, "An engine can at least `generate` or `loglikelihood` for a model it accepts.", repr(able))
    silent = [
        n for n in able.lacks(("generate", "loglikelihood", "prompt_embeds", "adapters")) if n not in able.reasons
    ]
    demand(not silent, "`reasons` says why not, for each thing the engine cannot do.", f"none for {', '.join(silent)}")
    _check_light(engine, info, options)
    return able


def _check_light(engine: Engine, info: ModelInfo, options: Any) -> None:
    """Planning asks every engine, so `availability` and `capabilities` must not import what `open` needs."""
    cls = type(engine)
    module = sys.modules[cls.__module__]
    if getattr(module, cls.__qualname__, None) is not cls:
        # A class made inside a function cannot be found by another process.
        return
    rule = "`availability` and `capabilities` run in a fresh process without heavy imports."
    call = {
        "class": cls.__qualname__,
        "model": info.model_dump(mode="json"),
        "options": options.model_dump(mode="json"),
    }
    heavy = in_fresh_process(cls.__module__, getattr(module, "__file__", None), call, rule)
    demand(not heavy, rule, f"they imported {', '.join(heavy)}")


def _prompts(info: ModelInfo, tiny: Path) -> list[Request]:
    """Prompts of different lengths, out of order; an endpoint gets text alone."""
    decoding = Decoding(max_new_tokens=8)
    texts = [SENTENCES[i][: 12 * (1 + i % 4)] for i in (3, 0, 6, 1, 4, 2)]
    if not info.path:
        return [Request("generate", (), decoding=decoding, prompt=text) for text in texts]
    file = Path(info.path) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(file))
        ids = [tuple(fast.encode(text).ids) for text in texts]
    else:
        slow = open_tokenizer(info)
        ids = [tuple(slow(text)["input_ids"]) for text in texts]
    return [Request("generate", one, decoding=decoding, prompt=text) for one, text in zip(ids, texts, strict=True)]


def _check_session(bench: _Bench, session: Session) -> list[Output]:
    try:
        canonical(dict(session.facts))
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"`Session.facts` are plain JSON values: they go into provenance.\n  seen: {error}"
        ) from None
    asked = _requests(bench)
    plan = session.batches(asked)
    flat = sorted(i for batch in plan for i in batch)
    partition = flat == list(range(len(asked))) and all(plan)
    demand(partition, "`batches` names each request exactly once, in groups that are not empty.", repr(plan))
    demand(session.batches(list(asked)) == plan, "`batches` is a function of the requests alone.", "two plans differ")
    demand(session.batches([]) == [], "`batches` of no request is no batch.", repr(session.batches([])))
    first = bench.ask(session, asked)
    for request, output in zip(asked, first, strict=True):
        _check_output(request, output)
    again = bench.ask(session, asked)
    _compare(bench, first, again, "Greedy answers are the same when asked again.")
    demand(session.batches(asked) == plan, "`batches` does not depend on what ran before.", "the plan changed")
    alone = [session.run([request])[0] for request in asked]
    _compare(bench, first, alone, "A batch's outputs are in the order of its requests, and alone they are the same.")
    if bench.able.generate:
        _check_generation(session, asked[0], first[0])
    if bench.able.loglikelihood and bench.able.generate:
        _check_likelihoods(bench, session)
    for name in ("adapter", "control"):
        _check_not_ignored(session, asked[0], name, asked[1:2])
    return first


def _requests(bench: _Bench) -> list[Request]:
    if bench.able.generate:
        return bench.prompts
    return [_continued(one, one.prompt_ids[:2] or (1,), one.prompt[:4]) for one in bench.prompts]


def _continued(prompt: Request, ids: tuple[int, ...], text: str) -> Request:
    kept = ids if prompt.prompt_ids else ()
    return replace(prompt, kind="loglikelihood", continuation_ids=kept, continuation=text, decoding=None)


def _check_output(request: Request, output: Output) -> None:
    demand(isinstance(output, Output), "`run` returns harness.Output objects.", type(output).__name__)
    demand(output.error is None, "A plain request is answered without an error.", repr(output.error))
    if request.kind == "loglikelihood":
        value = output.logprob
        proper = value is not None and math.isfinite(value) and value <= 0
        demand(proper, "`logprob` is finite and at most 0 (the logarithm of a probability).", repr(value))
        demand(isinstance(output.is_greedy, bool), "`is_greedy` is True or False.", repr(output.is_greedy))
        return
    assert request.decoding is not None
    budget = request.decoding.max_new_tokens
    demand(output.finish in ("stop", "length"), "`finish` is 'stop' or 'length'.", repr(output.finish))
    within = len(output.token_ids) <= budget
    demand(within, "An answer has at most `max_new_tokens` tokens.", f"{len(output.token_ids)} of {budget}")


def _compare(bench: _Bench, one: list[Output], two: list[Output], rule: str) -> None:
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        # What an engine marks may differ in its last bits, and so in its text.
        if a.batch_dependent or b.batch_dependent:
            continue
        demand((a.text, a.token_ids) == (b.text, b.token_ids), rule, f"request {index}: {a.text!r} and {b.text!r}")
        far = abs((a.logprob or 0.0) - (b.logprob or 0.0)) > bench.tolerance
        demand(not far, rule, f"request {index}: log-likelihoods {a.logprob} and {b.logprob}")


def _check_generation(session: Session, request: Request, output: Output) -> None:
    assert request.decoding is not None
    cut = session.run([replace(request, decoding=Decoding(max_new_tokens=1))])[0]
    begins = output.text.startswith(cut.text.rstrip("\ufffd"))
    demand(
        begins, "A greedy answer with fewer tokens is the beginning of the longer.", f"{cut.text!r}, {output.text!r}"
    )
    stop = next((letter for letter in output.text[1:] if letter.isascii()), None)
    if stop is None:
        return
    stopped = session.run([replace(request, decoding=request.decoding.model_copy(update={"stop": (stop,)}))])[0]
    expected = output.text.partition(stop)[0]
    demand(
        stopped.text == expected,
        "A stop text ends the answer and is no part of it.",
        f"{stopped.text!r}, stop {stop!r}",
    )
    demand(stopped.finish == "stop", "An answer that meets a stop text has finish='stop'.", repr(stopped.finish))


def _check_likelihoods(bench: _Bench, session: Session) -> None:
    """The greedy token is greedy, others are not and are less likely, and log-probabilities obey the chain rule."""
    single = [replace(one, decoding=Decoding(max_new_tokens=1)) for one in bench.prompts]
    pairs = list(zip(single, bench.ask(session, single), strict=True))
    clean = [(r, o) for r, o in pairs if o.text and "\ufffd" not in o.text]
    usable = [(r, o) for r, o in clean if len(o.token_ids) == 1 or not r.prompt_ids]
    demand(bool(usable), "With max_new_tokens=1 an answer has one token in `token_ids`.", repr([o for _, o in pairs]))
    best = [_continued(r, o.token_ids, o.text) for r, o in usable]
    greedy = bench.ask(session, best)
    for request, output in zip(best, greedy, strict=True):
        _check_output(request, output)
        rule = "The token that greedy generation chose has is_greedy=True."
        demand(output.is_greedy is True, rule, f"{request.continuation!r}: {output}")
    other = [_continued(r, tuple(i + 1 if i < 300 else i - 1 for i in o.token_ids), o.text + "~") for r, o in usable]
    for request, output, top in zip(other, bench.ask(session, other), greedy, strict=True):
        _check_output(request, output)
        less = output.is_greedy is False and (output.logprob or 0.0) <= (top.logprob or 0.0) + bench.tolerance
        demand(
            less,
            "A token that greedy generation did not choose has is_greedy=False.",
            f"{request.continuation!r}: {output}",
        )
    if usable[0][0].prompt_ids:
        _check_chain_rule(bench, session, usable[0][0])


def _check_chain_rule(bench: _Bench, session: Session, prompt: Request) -> None:
    a, b = prompt.prompt_ids[-2:-1] or (5,), prompt.prompt_ids[-1:]
    after = replace(prompt, prompt_ids=prompt.prompt_ids + a)
    asked = [_continued(prompt, a + b, ""), _continued(prompt, a, ""), _continued(after, b, "")]
    both, first, second = (output.logprob or 0.0 for output in bench.ask(session, asked))
    rule = "`logprob` is the sum over the continuation: log p(ab|x) = log p(a|x) + log p(b|xa), in nats."
    demand(abs(both - first - second) <= bench.tolerance, rule, f"{both} and {first} + {second}")


def _check_not_ignored(session: Session, request: Request, name: str, beside: Sequence[Request]) -> None:
    asked = replace(request, adapter=ABSENT) if name == "adapter" else replace(request, control=ABSENT)
    try:
        outputs = session.run([asked, *beside])
    except Exception:
        # Refusing loudly is allowed: the harness counts it against the whole batch.
        return
    rule = f"A request with an unknown `{name}` is answered with Output(error=...), never as if it had none."
    demand(outputs[0].error is not None, rule, repr(outputs[0]))


_VALUES = {"first": (7, 30, 99), "second": (8, 9)}
"""Tokens whose embeddings stand for the values of the kit's conditionings."""


def _check_embeds(bench: _Bench, scratch: Path) -> None:
    """Virtual tokens that are the model's own embeddings of some tokens count as those tokens.

    In a model of its own, and in an adapter where the engine serves any.
    """
    own = tiny_model(scratch / "conditioned")
    adapters: list[AdapterInfo] = []
    if bench.able.max_adapters > 0:
        folder = tiny_conditioning(tiny_adapter(scratch / "steered", own), own, _VALUES)
        base = inspect_model(ModelSpec(model=str(own)))
        adapter = inspect_adapter(str(folder), base, conditioned=True)
        # What it cannot serve is folded into a model, which the other half of this check is about.
        adapters = [adapter] if bench.engine.adapter_problem(base, adapter, bench.options) is None else []
    tiny_conditioning(own, own, _VALUES)
    model = inspect_model(ModelSpec(model=str(own)), conditioned=True)
    model = model.model_copy(update={"spec": bench.model.spec})
    session = bench.engine.open(model, adapters, bench.options)
    try:
        for name in (None, *(adapter.name for adapter in adapters)):
            _check_embedded(bench, session, [replace(one, adapter=name) for one in bench.prompts])
    finally:
        session.close()


def _check_embedded(bench: _Bench, session: Session, prompts: Sequence[Request]) -> None:
    names = list(_VALUES)
    values = [(None, *names)[number % 3] for number in range(len(prompts))]
    places = [1 if number % 2 else len(one.prompt_ids) for number, one in enumerate(prompts)]
    plain, soft = [], []
    for one, value, at in zip(prompts, values, places, strict=True):
        ids = one.prompt_ids
        stood = _VALUES[value] if value is not None else ()
        plain.append(replace(one, prompt_ids=ids[:at] + stood + ids[at:]))
        soft.append(one if value is None else replace(one, control=value, control_at=at))
    able = bench.able
    rule = "A `control` whose virtual tokens are embeddings of real tokens is answered as those tokens are"
    if able.generate:
        _demand_alike(bench, bench.ask(session, plain), bench.ask(session, soft), f"{rule} (beside plain prompts).")
        apart = [replace(prompts[0], control=value, control_at=1) for value in names]
        both = bench.ask(session, apart)
        alone = [bench.ask(session, [one])[0] for one in apart]
        _demand_alike(bench, alone, both, "Requests that differ in `control` alone are answered each under its own.")
    if able.loglikelihood and not able.lacks(["loglikelihood_embeds"]):
        ends = [_continued(one, (5, 6), "") for one in plain], [_continued(one, (5, 6), "") for one in soft]
        _demand_alike(bench, bench.ask(session, ends[0]), bench.ask(session, ends[1]), f"{rule}, log-likelihoods too.")


def _demand_alike(bench: _Bench, one: list[Output], two: list[Output], rule: str) -> None:
    """Exactly; of what an engine marks as batch-dependent the first token, and log-likelihoods within the tolerance."""
    for index, (a, b) in enumerate(zip(one, two, strict=True)):
        demand(b.error is None, rule, f"request {index}: {b.error!r}")
        upto = 1 if a.batch_dependent or b.batch_dependent else None
        demand(a.token_ids[:upto] == b.token_ids[:upto], rule, f"request {index}: {a.text!r} and {b.text!r}")
        far = abs((a.logprob or 0.0) - (b.logprob or 0.0)) > bench.tolerance
        demand(not far, rule, f"request {index}: log-likelihoods {a.logprob} and {b.logprob}")


def _check_reopened(bench: _Bench, session: Session, first: list[Output], adapters: list[AdapterInfo]) -> None:
    asked = _requests(bench)
    plain = bench.ask(session, asked)
    beside = " (an adapter is open beside it)" if adapters else ""
    _compare(bench, first, plain, f"After `close` the model opens again and the base answers as before{beside}.")
    for adapter in adapters:
        changed = bench.ask(session, [replace(one, adapter=adapter.name) for one in asked])
        errors = [output.error for output in changed if output.error]
        demand(not errors, "An open adapter answers.", repr(errors[:1]))
        same = all((a.text, a.logprob) == (b.text, b.logprob) for a, b in zip(plain, changed, strict=True))
        demand(not same, "A request with an open `adapter` is answered by base + adapter.", "the base's own answers")
