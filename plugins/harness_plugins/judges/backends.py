"""Where a judge's replies come from: a server's chat API, or a local model in one of the engines."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from harness import Output, Request, UserError, digest_of
from harness_plugins.engines.openai.engine import FINISH
from harness_plugins.engines.openai.server import Refused, mapping, nats
from harness_plugins.judges.options import JudgeOptions, judge_dtype, open_server
from harness_plugins.judges.words import Ask, Budget, Reply, Spent

TURN_TOKENS = 16
"""Tokens that a chat template adds to a message, at most, beside those of its text."""

Batch = list[tuple[str, Reply]]


def most_tokens(ask: Ask) -> int:
    """A bound on a prompt's tokens: no token is shorter than a byte."""
    return sum(len(message["content"].encode()) + TURN_TOKENS for message in ask.messages)


class Endpoint:
    """A judge behind a URL. Asked in this order, answered in any; at most ``concurrency`` at a time."""

    def __init__(self, options: JudgeOptions, where: str, budget: Budget) -> None:
        self._options, self._where, self._budget = options, where, budget
        self._server = open_server(options, where)
        self._length_key, self._left_out = "max_tokens", set[str]()
        self._logprobs_seen = False
        self.facts: dict[str, Any] = {"judge": options.served_model, "url": self._server.shown}

    def replies(self, asks: Mapping[str, Ask], missing: set[str]) -> Iterator[Batch]:
        """Replies as they come.

        Raises:
            Spent: the next call might cost more than is left, and none is in flight any more.
        """
        waiting = [key for key in asks if key in missing]
        jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, Reply | BaseException]] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while (key := jobs.get()) is not None and not stop.is_set():
                try:
                    done.put((key, self._reply(asks[key], stop)))
                except BaseException as error:
                    done.put((key, error))

        workers = min(self._options.concurrency, len(waiting))
        # Daemons: after Ctrl-C the process need not wait for replies that nobody reads.
        for _ in range(workers):
            threading.Thread(target=work, daemon=True).start()
        flying, position = 0, 0
        try:
            while position < len(waiting) or flying:
                while position < len(waiting) and flying < workers:
                    if not self._budget.take(self._most(asks[waiting[position]])):
                        break
                    jobs.put(waiting[position])
                    flying, position = flying + 1, position + 1
                if not flying:
                    raise Spent
                key, reply = done.get()
                flying -= 1
                self._budget.settle(self._most(asks[key]))
                if isinstance(reply, BaseException):
                    raise reply
                yield [(key, reply)]
        finally:
            stop.set()
            for _ in range(workers):
                jobs.put(None)

    def _most(self, ask: Ask) -> float:
        return self._options.price(most_tokens(ask), ask.decoding.max_new_tokens)

    def _reply(self, ask: Ask, stop: threading.Event) -> Reply:
        try:
            return self._read(ask, self._send(ask, stop))
        except Refused as refusal:
            return Reply(error=str(refusal), passing=refusal.passing)

    def _send(self, ask: Ask, stop: threading.Event) -> dict[str, Any]:
        """Post; what this server does not take is asked for in another way, or left out."""
        digest = digest_of([list(map(dict, ask.messages)), ask.decoding.model_dump(mode="json")])
        while True:
            try:
                return self._server.post("chat/completions", self._body(ask), stop, digest)
            except Refused as refusal:
                said = str(refusal)
                if ask.question.alternatives and "logprob" in said:
                    raise self._no_logprobs(said) from None
                if "max_completion_tokens" in said and self._length_key == "max_tokens":
                    self._length_key = "max_completion_tokens"
                    continue
                # Models that reason refuse every temperature but their own, some servers know no seed.
                unknown = {name for name in ("temperature", "seed") if name in said and "HTTP 4" in said}
                if not unknown - self._left_out:
                    raise
                self._left_out |= unknown
                self.facts["not sent, as the server refuses it"] = sorted(self._left_out)

    def _body(self, ask: Ask) -> dict[str, Any]:
        decoding = ask.decoding
        body: dict[str, Any] = {
            "model": self._options.served_model,
            "messages": [dict(message) for message in ask.messages],
            "temperature": decoding.temperature,
            self._length_key: decoding.max_new_tokens,
        }
        if not decoding.greedy:
            body["seed"] = decoding.seed
        if ask.question.alternatives:
            body |= {"logprobs": True, "top_logprobs": self._options.top_logprobs}
        return {key: value for key, value in body.items() if key not in self._left_out}

    def _read(self, ask: Ask, answer: Mapping[str, Any]) -> Reply:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Refused("the server's answer has no choices", passing=True)
        choice = choices[0]
        text = mapping(choice.get("message")).get("content")
        reason = str(choice.get("finish_reason"))
        logprobs = self._logprobs(ask, choice) if ask.question.alternatives else None
        if reason == "content_filter":
            raise Refused("the server withheld the judge's reply (content_filter)")
        if not isinstance(text, str) and logprobs is None:
            raise Refused(f"the server's answer has no text (finish_reason {reason!r})", passing=True)
        text = text if isinstance(text, str) else ""
        usage = answer.get("usage")
        counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
        told = [count for count in counts if isinstance(count, int) and count >= 0]
        if len(told) == 2:
            return Reply(text, FINISH.get(reason), logprobs, told[0], told[1])
        most = min(ask.decoding.max_new_tokens, len(text.encode(errors="replace")) + 1)
        return Reply(text, FINISH.get(reason), logprobs, most_tokens(ask), most, counted=False)

    def _logprobs(self, ask: Ask, choice: Mapping[str, Any]) -> dict[str, float]:
        """Log-probabilities of those alternatives that are among the most likely first tokens."""
        entries = mapping(choice.get("logprobs")).get("content")
        if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
            if not self._logprobs_seen:
                raise self._no_logprobs("its answer holds none")
            raise Refused("the server left out the log-probabilities", passing=True)
        self._logprobs_seen = True
        tops = entries[0].get("top_logprobs")
        listed = [entries[0], *(tops if isinstance(tops, list) else [])]
        tokens = {
            str(entry["token"]): nats(entry["logprob"])
            for entry in map(mapping, listed)
            if isinstance(entry.get("logprob"), int | float) and "token" in entry
        }
        stripped: dict[str, float] = {}
        for token, value in sorted(tokens.items(), key=lambda pair: pair[1]):
            stripped[token.strip()] = value
        found = {one: tokens.get(one, stripped.get(one)) for one in ask.question.alternatives}
        return {one: value for one, value in found.items() if value is not None}

    def _no_logprobs(self, seen: str) -> UserError:
        return UserError(
            f"{self._where}, {self._server.shown}",
            f"the judge must be asked for log-probabilities, and the server gives none: {seen}",
            "Take a server that does (OpenAI, vLLM), a local judge, or an annotator that reads the judge's words.",
        )

    def close(self) -> None:
        """Drop the connections, and with them the key."""
        self._server.close()


class Local:
    """A judge in an engine of this machine. Batches are planned from all questions of a round.

    A batch of which anything is missing runs whole, so that an interrupted run ends with the replies of an
    uninterrupted one; what is in the journal stays as it is.
    """

    def __init__(
        self,
        options: JudgeOptions,
        where: str,
        open_engine: Callable[..., Any] | None,
        needs: Sequence[str],
    ) -> None:
        if open_engine is None:
            raise UserError(
                f"{where}, model", f"{options.model} is local, and no engine is at hand here", "Give a judge by URL."
            )
        self._where = where
        self._open = open_engine(
            options.model,
            options.engine,
            options.engine_options,
            dtype=judge_dtype(options, where),
            revision=options.revision,
            needs=tuple(needs),
            where=where,
        )
        self.facts = {"judge": self._open.model.name, **dict(self._open.session.facts)}

    def replies(self, asks: Mapping[str, Ask], missing: set[str]) -> Iterator[Batch]:
        """Replies batch by batch; a question is answered when all its requests are."""
        requests: list[Request] = []
        owner: list[str] = []
        short: Batch = []
        for key, ask in asks.items():
            made = self._requests(ask)
            if isinstance(made, str):
                short += [(key, Reply(error=made))] if key in missing else []
                continue
            requests += made
            owner += [key] * len(made)
        if short:
            yield short
        outputs: dict[int, Output] = {}
        places: dict[str, list[int]] = {}
        for index, key in enumerate(owner):
            places.setdefault(key, []).append(index)
        for batch in self._open.session.batches(requests) if requests else []:
            if not any(owner[index] in missing for index in batch):
                continue
            outputs.update(zip(batch, self._open.session.run([requests[i] for i in batch]), strict=True))
            keys = dict.fromkeys(owner[index] for index in batch if owner[index] in missing)
            whole = [key for key in keys if all(index in outputs for index in places[key])]
            yield [(key, self._reply(asks[key], places[key], requests, outputs)) for key in whole]

    def _requests(self, ask: Ask) -> list[Request] | str:
        """The engine's requests; a text: why the question cannot be put."""
        ids, text = self._open.chat(ask.messages)
        room = self._open.model.max_length - ask.decoding.max_new_tokens
        if len(ids) > room:
            return f"the question has {len(ids)} tokens, and the judge's context leaves room for {max(0, room)}"
        shared: dict[str, Any] = {"prompt_ids": tuple(ids), "prompt": text, "messages": ask.messages}
        if not ask.question.alternatives:
            return [Request("generate", decoding=ask.decoding, **shared)]
        return [
            Request(
                "loglikelihood", continuation_ids=self._open.continuation(text, ids, one), continuation=one, **shared
            )
            for one in ask.question.alternatives
        ]

    def _reply(
        self, ask: Ask, places: Sequence[int], requests: Sequence[Request], outputs: Mapping[int, Output]
    ) -> Reply:
        found = [outputs[place] for place in places]
        error = next((output.error for output in found if output.error is not None), None)
        if error is not None:
            return Reply(error=error)
        prompt = len(requests[places[0]].prompt_ids)
        if not ask.question.alternatives:
            return Reply(found[0].text, found[0].finish, None, prompt, len(found[0].token_ids))
        pairs = zip(ask.question.alternatives, found, strict=True)
        logprobs = {one: output.logprob for one, output in pairs if output.logprob is not None}
        return Reply("", "length", logprobs, prompt, 0)

    def close(self) -> None:
        """Release the model."""
        self._open.close()
