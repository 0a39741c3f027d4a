"""Any OpenAI-compatible endpoint, over HTTP: completions (with log-likelihoods where the server gives them) or chat.

The key is read from the environment when the endpoint is opened; it lives in the HTTP client only and is cut out of
everything that a server says before that is shown or stored. An address that holds credentials is refused.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

import harness
from harness import (
    AdapterInfo,
    Availability,
    Capabilities,
    Config,
    Decoding,
    Engine,
    ModelInfo,
    Output,
    Request,
    Session,
    UserError,
    with_tokenizer,
)
from harness_plugins.engines.openai.server import Refused, Server, check_address, complete_url, mapping, nats, shown_url

FINISH: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "eos": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
}
MOST_STOPS = 4
"""OpenAI refuses more stop strings in a request. All of them are applied here afterwards, so only time is lost."""


class OpenAIEngine(Engine["OpenAIEngine.Config"]):
    """A model behind a URL."""

    name = "openai"
    summary = "any OpenAI-compatible URL: completions or chat"
    remote = True

    class Config(harness.Config):
        """Which endpoint, and how hard to try."""

        base_url: str | None = Field(None, description="address, as http://host:8000/v1; the model's, when it is a URL")
        model: str | None = Field(None, description="name the server knows; its only one when absent")
        answers_as: str | None = Field(
            None,
            description="name under which the model answers, where that is another (a proxy's alias, say)",
        )
        api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if one is set")
        endpoint: Literal["completions", "chat"] = Field("completions", description="which of the two APIs is called")
        tokenizer: str | None = Field(
            None,
            description="the model's tokenizer (folder or hub id): sends token ids, allows log-likelihoods",
        )
        max_length: int | None = Field(
            None, ge=1, description="the model's context (tokens): longer prompts are cut; 2,048 when absent"
        )
        concurrency: int = Field(16, ge=1, description="requests in flight at most (count)")
        retries: int = Field(6, ge=0, description="further attempts after one that failed (count)")
        backoff: float = Field(0.5, ge=0, description="wait before the first further attempt, then doubled (seconds)")
        max_wait: float = Field(120.0, ge=0, description="longest wait before an attempt, Retry-After or not (seconds)")
        timeout: float = Field(600.0, gt=0, description="longest time that a request may take (seconds)")
        chunk: int = Field(128, ge=1, description="requests that are answered, then stored, at once (count)")

    def availability(self) -> Availability:
        """Always: whether the server answers is seen when it is opened."""
        return Availability(True, "needs the address of a server")

    def capabilities(self, model: ModelInfo, options: Config) -> Capabilities:
        """What the chosen API offers."""
        reasons = {
            "prompt_embeds": "the OpenAI API takes no embeddings",
            "adapters": "the server decides what it serves: name the adapter there as engine.model",
        }
        if options.endpoint == "chat":
            reasons["loglikelihood"] = "the chat API gives no log-probabilities of a prompt; use endpoint completions"
        elif options.tokenizer is None:
            reasons["loglikelihood"] = "log-likelihoods are aligned by token: set engine.tokenizer"
        return Capabilities(True, "loglikelihood" not in reasons, chat_only=options.endpoint == "chat", reasons=reasons)

    def settle(self, model: ModelInfo, options: Config) -> tuple[ModelInfo, Any]:
        """The server's address and the model's name there, so that another model is another evaluation."""
        address = options.base_url or model.ref
        check_address(address, options.api_key_env, "engine.base_url", "engine.api_key_env")
        filled = {"base_url": address}
        if not options.model and address.startswith(("http://", "https://")):
            server = Server(complete_url(address), options)
            try:
                filled["model"] = server.settle_model()
            finally:
                server.close()
        if options.tokenizer is not None:
            model = with_tokenizer(model, options.tokenizer, "--set engine.tokenizer")
        model = model.model_copy(update={"name": str(filled.get("model") or options.model).rsplit("/", 1)[-1]})
        if options.max_length is not None:
            model = model.model_copy(update={"max_length": options.max_length})
        return model, options.model_copy(update=filled)

    def identity(self, options: Config) -> dict[str, Any]:
        """Address (without credentials), model and API: all that is known of what answers."""
        return {
            "name": self.name,
            "base_url": shown_url(options.base_url) if options.base_url else None,
            "model": options.model,
            "endpoint": options.endpoint,
            "token_ids": options.tokenizer is not None,
        }

    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Config) -> Session:
        """Reach the server and settle the model's name.

        Raises:
            UserError: no address, nobody listens there, the key is refused, or the model cannot be told.
        """
        if adapters:
            raise UserError(
                "engine openai",
                f"cannot load adapter {adapters[0].ref}",
                "Let the server serve it and give its name as engine.model.",
            )
        address = options.base_url or model.ref
        check_address(address, options.api_key_env, "engine.base_url", "engine.api_key_env")
        if not address.startswith(("http://", "https://")):
            raise UserError(
                "engine.base_url", f"{address!r} is not an http address", "Give for example http://localhost:8000/v1."
            )
        server = Server(complete_url(address), options)
        try:
            return OpenAISession(server, server.settle_model(), options)
        except BaseException:
            server.close()
            raise


@dataclass
class Dialect:
    """What this server was found to want; settled by the first request that it refuses otherwise."""

    least_tokens: int = 0
    """Completions that only score: some servers refuse max_tokens=0."""
    length_key: str = "max_tokens"
    """Chat: OpenAI's newer models want max_completion_tokens."""


class OpenAISession(Session):
    """An endpoint that answered. ``Output.token_ids`` stays empty: a server's text has no ids that could be trusted."""

    def __init__(self, server: Server, model: str, options: Any) -> None:
        self._server, self._model, self._options = server, model, options
        self._dialect = Dialect()
        self.facts = {"engine": "openai", "base_url": server.shown, "model": model, "endpoint": options.endpoint}

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Chunks of one kind, in order."""
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(request.kind, []).append(index)
        size = self._options.chunk
        return [group[i : i + size] for group in kinds.values() for i in range(0, len(group), size)]

    def run(self, requests: Sequence[Request]) -> list[Output]:
        """Answer a batch, ``concurrency`` requests at a time.

        Raises:
            UserError: the server cannot be reached, refuses the key, has no such model, or gives no log-probabilities.
        """
        for request in requests:
            self._check(request)
        outputs: list[Output | None] = [None] * len(requests)
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(requests)):
            waiting.put(index)
        done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    outputs[index] = self._answer(requests[index], stop)
                except BaseException as error:
                    done.put(error)
                    return
                done.put(None)

        # Daemons: after Ctrl-C the process need not wait for answers that nobody reads.
        for _ in range(min(self._options.concurrency, len(requests))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in requests:
                error = done.get()
                if error is not None:
                    raise error
                self.tell(1)
        finally:
            stop.set()
        return [output for output in outputs if output is not None]

    def _check(self, request: Request) -> None:
        if request.control is not None or request.adapter is not None:
            what = f"adapter {request.adapter!r}" if request.control is None else f"value {request.control!r}"
            raise UserError(
                "engine openai", f"cannot honour {what} of a request", "Use --engine transformers or vllm for it."
            )
        if self._options.endpoint == "chat" and request.messages and request.messages[-1]["role"] == "assistant":
            raise UserError(
                "engine openai",
                "the task begins the model's answer, and a chat endpoint begins answers itself",
                "Set engine.endpoint=completions and engine.tokenizer, or leave that task out.",
            )
        if request.kind == "loglikelihood" and (self._options.endpoint == "chat" or self._options.tokenizer is None):
            raise UserError(
                "engine openai",
                "this endpoint gives no log-likelihoods",
                "Set engine.endpoint=completions and engine.tokenizer to the model's tokenizer.",
            )

    def _answer(self, request: Request, stop: threading.Event) -> Output:
        read = self._logprob if request.kind == "loglikelihood" else self._text
        try:
            return read(request, stop)
        except Refused as refusal:
            return Output(error=str(refusal), batch_dependent=True)

    def _send(
        self,
        body: Callable[[], dict[str, Any]],
        mend: Callable[[str], bool],
        request: Request,
        stop: threading.Event,
    ) -> dict[str, Any]:
        """Post; where the server refuses, try once more if ``mend`` knows another way of asking."""
        path = "chat/completions" if self._options.endpoint == "chat" else "completions"
        try:
            return self._server.post(path, body(), stop, request.digest)
        except Refused as refusal:
            if not mend(str(refusal)):
                raise
            return self._server.post(path, body(), stop, request.digest)

    def _text(self, request: Request, stop: threading.Event) -> Output:
        decoding = request.decoding or Decoding()
        chat = self._options.endpoint == "chat"

        def body() -> dict[str, Any]:
            return self._text_body(request, decoding)

        def mend(said: str) -> bool:
            if not chat or "max_completion_tokens" not in said:
                return False
            self._dialect.length_key = "max_completion_tokens"
            return True

        choice = self._choice(self._send(body, mend, request, stop))
        text = mapping(choice.get("message")).get("content") if chat else choice.get("text")
        reason = choice.get("finish_reason")
        if reason == "content_filter":
            return Output(error="the server withheld its answer (content_filter)", batch_dependent=True)
        if not isinstance(text, str):
            return Output(error=f"the server's answer has no text (finish_reason {reason!r})", batch_dependent=True)
        found = [place for place in (text.find(s) for s in decoding.stop if s) if place >= 0]
        finish = FINISH.get(str(reason))
        if found:
            text, finish = text[: min(found)], "stop"
        return Output(text, finish=finish, batch_dependent=True)

    def _text_body(self, request: Request, decoding: Decoding) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "temperature": decoding.temperature, "top_p": decoding.top_p}
        if self._options.endpoint == "chat":
            body["messages"] = [dict(m) for m in request.messages or ({"role": "user", "content": request.prompt},)]
            body[self._dialect.length_key] = decoding.max_new_tokens
        else:
            body["prompt"] = self._prompt(request)
            body["max_tokens"] = decoding.max_new_tokens
        if stops := [stop for stop in decoding.stop if stop][:MOST_STOPS]:
            body["stop"] = stops
        if decoding.seed is not None and not decoding.greedy:
            body["seed"] = decoding.seed
        return body

    def _prompt(self, request: Request) -> str | list[int]:
        if self._options.tokenizer is not None and request.prompt_ids:
            return list(request.prompt_ids)
        return request.prompt

    def _logprob(self, request: Request, stop: threading.Event) -> Output:
        """Sum of the continuation's log-probabilities: the server echoes the ids, entry i belongs to id i."""
        if not request.continuation_ids:
            return Output(logprob=0.0, is_greedy=True, batch_dependent=True)
        ids = list(request.prompt_ids + request.continuation_ids)

        def body() -> dict[str, Any]:
            fixed = {"model": self._model, "prompt": ids, "echo": True, "logprobs": 1, "temperature": 0.0}
            return {**fixed, "max_tokens": self._dialect.least_tokens}

        def mend(said: str) -> bool:
            if "logprobs" in said or "echo" in said:
                raise self._no_logprobs(said)
            if self._dialect.least_tokens or "max_tokens" not in said:
                return False
            self._dialect.least_tokens = 1
            return True

        choice = self._choice(self._send(body, mend, request, stop))
        given = mapping(choice.get("logprobs"))
        values, tops = given.get("token_logprobs"), given.get("top_logprobs")
        if not isinstance(values, list) or not isinstance(tops, list) or min(len(values), len(tops)) < len(ids):
            seen = "none" if not isinstance(values, list) else f"{len(values)} for a prompt of {len(ids)} tokens"
            raise self._no_logprobs(f"log-probabilities in the answer: {seen}")
        places = range(len(request.prompt_ids), len(ids))
        scored = [nats(values[place]) for place in places]
        best = [max(map(nats, mapping(tops[place]).values()), default=None) for place in places]
        if None in best:
            raise Refused("the server left out log-probabilities of the continuation")
        is_greedy = all(one >= top for one, top in zip(scored, best, strict=True) if top is not None)
        return Output(logprob=sum(scored), is_greedy=is_greedy, batch_dependent=True)

    def _no_logprobs(self, seen: str) -> UserError:
        return UserError(
            f"engine openai, {self._server.shown}",
            f"the server gives no log-probabilities of a prompt (echo with logprobs): {seen}",
            "Use a server that does (vLLM), or tasks that only generate.",
        )

    @staticmethod
    def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Refused("the server's answer has no choices")
        return choices[0]

    def close(self) -> None:
        """Drop the connections."""
        self._server.close()
