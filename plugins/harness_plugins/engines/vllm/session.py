"""An open vLLM: requests in, outputs out.

Log-likelihoods. A continuation c of n tokens after a prompt p is scored by ONE pass over ``p + c[:-1]``: the first
n - 1 tokens by ``prompt_logprobs``, the last by ``logprob_token_ids`` at the one position that is generated. Requests
of one token that share a prompt (the choices of a question) share the pass. So nothing beyond the model's
context is ever fed, and a prompt that fills the context exactly still gets its score. Where the vectors of a control
stand in the prompt, or LoRA forbids ``prompt_logprobs``, every token is scored by a pass of its own.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from harness import AdapterInfo, Decoding, ModelInfo, Output, Request, Session, StepError, end_tokens, soft_prompt
from harness_plugins.engines.vllm.support import Environment, distribution, hint, root

MOST_TOKEN_IDS = 128
"""vLLM's bound on the length of ``logprob_token_ids``."""


class VllmSession(Session):
    """An open vLLM.

    ``Output.token_ids`` are the generated ids without the end-of-sequence token; where a stop string cut the text,
    they still hold the tokens up to and with the one that completed it.
    """

    def __init__(self, llm: Any, model: ModelInfo, limit: int, options: Any, environment: Environment) -> None:
        self._llm, self._model, self._limit, self._chunk = llm, model, limit, options.chunk
        self._environment: Environment | None = environment
        self._tokenizer = llm.get_tokenizer()
        self._loras: dict[str | None, Any] = {None: None}
        self._refused: dict[str, StepError] = {}
        self._conditioned: dict[str | None, AdapterInfo | ModelInfo] = {None: model} if model.conditioning else {}
        self._soft: dict[tuple[str | None, str], Any] = {}
        config = llm.llm_engine.model_config
        self._vocabulary = int(config.get_vocab_size())
        self._eos = {*end_tokens(model), *(int(i) for i in (self._tokenizer.eos_token_id,) if i is not None)}
        self._device = str(llm.llm_engine.vllm_config.device_config.device_type)
        self.facts = {
            "engine": "vllm",
            "device": self._device,
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_length": limit,
            "enforce_eager": bool(config.enforce_eager),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            | {name: str(version) for name, version in filter(None, [distribution()])},
        }

    def add(self, adapters: Sequence[AdapterInfo]) -> None:
        """Load adapters now, so that one that vLLM cannot serve fails before any work is done.

        One of several that it refuses is remembered: whoever asks for it is told, and the others are served.
        """
        from vllm.lora.request import LoRARequest

        # vLLM knows adapters by number, from 1 on; here None, the base, is the first entry.
        for number, adapter in enumerate(adapters, start=len(self._loras)):
            lora = LoRARequest(adapter.name, number, adapter.path)
            if adapter.conditioning is not None:
                self._conditioned[adapter.name] = adapter
            try:
                self._llm.llm_engine.add_lora(lora)
            except Exception as error:
                refused = StepError(
                    f"engine vllm, adapter {adapter.ref}",
                    f"vLLM cannot serve it: {root(error)}",
                    "Fold the adapter into its base (harness fold), or use --engine transformers.",
                )
                if len(adapters) == 1:
                    raise refused from error
                self._refused[adapter.name] = refused
            self._loras[adapter.name] = lora

    @property
    def _stepwise(self) -> bool:
        """Whether ``prompt_logprobs`` must be avoided: with LoRA on CPU it kills vLLM 0.32 (two prompts or more)."""
        return len(self._loras) > 1 and self._device == "cpu"

    @property
    def _apart(self) -> bool:
        """Whether base and adapters must not be in one call.

        On CPU, vLLM 0.32 then answers the base's prompts with the adapter, in silence (a prompt without LoRA has index
        -1, and its torch kernels read that as the last slot). Adapters among themselves are answered rightly.
        """
        return self._device == "cpu"

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Chunks of one kind and decoding, in order, adapters side by side; requests that share a prompt stay together.

        On CPU the base keeps to itself, as it cannot be in a call with adapters.
        """
        groups: dict[Any, dict[Any, list[int]]] = {}
        for index, request in enumerate(requests):
            apart = self._apart and request.adapter is None
            group = groups.setdefault((request.kind, apart, request.decoding), {})
            shared = request.adapter, request.prompt_ids, request.control, request.control_at
            group.setdefault(shared, []).append(index)
        plan: list[list[int]] = []
        for group in groups.values():
            batch: list[int] = []
            for unit in group.values():
                if batch and len(batch) + len(unit) > self._chunk:
                    plan.append(batch)
                    batch = []
                batch += unit
            plan.append(batch)
        return plan

    def run(self, requests: Sequence[Request]) -> list[Output]:
        """Answer a batch in one call of vLLM.

        Raises:
            StepError: a request asks for a conditioning value or an unknown adapter, or vLLM died.
        """
        if self._llm is None:
            raise StepError("engine vllm", "the session is closed", "Open it again.")
        calls = _Calls()
        readers: list[Callable[[], Output]] = []
        for request in requests:
            problem = self._problem(request)
            if problem is not None:
                readers.append(partial(Output, error=problem, batch_dependent=True))
            elif request.kind == "generate":
                readers.append(self._plan_text(request, calls))
            else:
                readers.append(self._plan_logprob(request, calls))
        try:
            with self._uncompiled():
                watch = None if self.progress is None else partial(_Watch, calls.share(self.tell, len(requests)))
                calls.carry_out(self._llm, self._loras, self._built, apart=self._apart, watch=watch)
        except Exception as error:
            raise StepError(f"engine vllm, model {self._model.ref}", f"failed: {root(error)}", hint(error)) from error
        return [read() for read in readers]

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """On CPU, eager: vLLM compiles a comparison in its sampler all the same, for seconds at every new shape."""
        if not (self._device == "cpu" and self.facts["enforce_eager"]):
            return nullcontext()
        import torch

        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance

    def _problem(self, request: Request) -> str | None:
        if request.adapter in self._refused:
            raise self._refused[request.adapter]
        if request.adapter not in self._loras:
            raise StepError("engine vllm", f"adapter {request.adapter!r} is not open", "Name it when opening.")
        virtual = len(self._vectors(request.adapter, request.control)) if request.control is not None else 0
        if request.control_at is not None and not 0 <= request.control_at <= len(request.prompt_ids):
            return f"its control stands at {request.control_at} of {len(request.prompt_ids)} tokens"
        if not request.prompt_ids:
            return "the prompt has no tokens"
        ids = request.prompt_ids + request.continuation_ids
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            return f"a token id is outside the vocabulary of {self._vocabulary}"
        # The last token of a continuation is scored, never fed.
        fed = virtual + (len(ids) - 1 if request.continuation_ids else len(ids))
        if fed > self._limit:
            return f"{fed} tokens do not fit the context of {self._limit}"
        return None

    def _vectors(self, adapter: str | None, control: str) -> Any:
        """The vectors that stand for a control, read once: (tokens, hidden size), in the model's type."""
        key = adapter, control
        if key not in self._soft:
            owner = self._conditioned.get(adapter)
            if owner is None:
                raise StepError("engine vllm", f"cannot honour the conditioning value {control!r}: it has none", "")
            self._soft[key] = soft_prompt(owner, control).to(self._llm.llm_engine.model_config.dtype)
        return self._soft[key]

    def _built(self, adapter: str | None, prompt: _Prompt) -> Any:
        """What vLLM takes: token ids; with vectors among them, a place holder for each, and which are no ids."""
        from vllm import TokensPrompt
        from vllm.inputs import EmbedsPrompt

        if prompt.control is None:
            return TokensPrompt(prompt_token_ids=list(prompt.ids))
        vectors, at = self._vectors(adapter, prompt.control), prompt.control_at
        count, length = len(vectors), len(prompt.ids)
        whole = vectors.new_zeros(length + count, vectors.shape[1])
        whole[at : at + count] = vectors
        return EmbedsPrompt(
            prompt_embeds=whole,
            prompt_token_ids=[*prompt.ids[:at], *[0] * count, *prompt.ids[at:]],
            prompt_is_token_ids=[*[True] * at, *[False] * count, *[True] * (length - at)],
        )

    def _plan_text(self, request: Request, calls: _Calls) -> Callable[[], Output]:
        from vllm import SamplingParams

        decoding = request.decoding or Decoding()
        stops = [stop for stop in decoding.stop if stop]
        virtual = len(self._vectors(request.adapter, request.control)) if request.control is not None else 0
        # Text is decoded here, from the generated ids alone, as the other engines do; vLLM's own detokenizer, which
        # looks back at the prompt, only watches for stop strings.
        params = SamplingParams(
            max_tokens=min(decoding.max_new_tokens, self._limit + 1 - len(request.prompt_ids) - virtual),
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=None if decoding.greedy else decoding.seed,
            stop=stops or None,
            stop_token_ids=sorted(self._eos),
            detokenize=bool(stops),
            logprobs=0,  # of the token drawn alone: from logits that are not finite it is no number
        )
        number = calls.add(request.adapter, _Prompt.of(request), params)
        return lambda: self._text(calls.results[number].outputs[0], stops)

    def _text(self, completion: Any, stops: Sequence[str]) -> Output:
        if completion.cumulative_logprob is not None and not math.isfinite(completion.cumulative_logprob):
            return Output(error="the model's logits are not finite", batch_dependent=True)
        ids = tuple(int(i) for i in completion.token_ids)
        if completion.finish_reason == "stop" and ids and ids[-1] in self._eos:
            ids = ids[:-1]
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        found = [position for position in (text.find(stop) for stop in stops) if position >= 0]
        if found:
            text = text[: min(found)]
        elif isinstance(completion.stop_reason, str):
            # The stop string began in a space that decoding drops at the very start.
            text = completion.text
        finish: Literal["stop", "length"] = "stop" if found or completion.finish_reason == "stop" else "length"
        if completion.finish_reason not in ("stop", "length"):
            return Output(text, ids, error=f"vLLM ended with {completion.finish_reason!r}", batch_dependent=True)
        return Output(text, ids, finish, batch_dependent=True)

    def _plan_logprob(self, request: Request, calls: _Calls) -> Callable[[], Output]:
        prompt, continuation = request.prompt_ids, request.continuation_ids
        if not continuation:
            return lambda: Output(logprob=0.0, is_greedy=True, batch_dependent=True)
        # vLLM gives no `prompt_logprobs` of a prompt with vectors in it.
        if len(continuation) == 1 or self._stepwise or request.control is not None:
            numbers = [
                (calls.probe(request.adapter, _Prompt.of(request, continuation[:place]), token), token)
                for place, token in enumerate(continuation)
            ]
            return lambda: _total([calls.probed(number, token) for number, token in numbers])
        number = calls.whole(request.adapter, _Prompt.of(request, continuation[:-1]), continuation[-1])

        def read() -> Output:
            rows = calls.results[number].prompt_logprobs
            scored = [_scored(rows[place], token) for place, token in enumerate(continuation[:-1], start=len(prompt))]
            return _total([*scored, calls.probed(number, continuation[-1])])

        return read

    def close(self) -> None:
        """Stop the engine core, free its memory, and put environment and torch back."""
        llm, self._llm, self._tokenizer = self._llm, None, None
        if llm is None:
            return
        try:
            llm.llm_engine.engine_core.shutdown()
        finally:
            del llm
            gc.collect()
            if self._environment is not None:
                self._environment.restore()
                self._environment = None


@dataclass(frozen=True)
class _Prompt:
    """Token ids, and the control whose vectors stand among them."""

    ids: tuple[int, ...]
    control: str | None
    control_at: int

    @classmethod
    def of(cls, request: Request, more: tuple[int, ...] = ()) -> _Prompt:
        """A request's prompt, and the beginning of an answer."""
        return cls(request.prompt_ids + more, request.control, request.control_at or 0)


class _Calls:
    """The prompts of one batch, each distinct scoring pass once, and what vLLM returned."""

    def __init__(self) -> None:
        self._prompts: list[tuple[str | None, _Prompt, Any]] = []
        self._open: dict[tuple[str | None, _Prompt], int] = {}
        self.results: list[Any] = []

    def add(self, adapter: str | None, prompt: _Prompt, params: Any) -> int:
        self._prompts.append((adapter, prompt, params))
        return len(self._prompts) - 1

    def whole(self, adapter: str | None, prompt: _Prompt, last: int) -> int:
        """A pass that scores every token of the prompt, and ``last`` after it."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=1, logprob_token_ids=[last], detokenize=False
        )
        return self.add(adapter, prompt, params)

    def probe(self, adapter: str | None, prompt: _Prompt, token: int) -> int:
        """A pass that scores ``token`` after the prompt; joins one that exists while that has room."""
        from vllm import SamplingParams

        number = self._open.get((adapter, prompt))
        if number is not None:
            wanted = self._prompts[number][2].logprob_token_ids
            if token in wanted:
                return number
            if len(wanted) < MOST_TOKEN_IDS:
                wanted.append(token)
                return number
        params = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=[token], detokenize=False)
        number = self._open[adapter, prompt] = self.add(adapter, prompt, params)
        return number

    def probed(self, number: int, token: int) -> tuple[float, bool]:
        """Log-probability (nats) of a token at the generated position, and whether it is the most likely one."""
        completion = self.results[number].outputs[0]
        return float(completion.logprobs[0][token].logprob), int(completion.token_ids[0]) == token

    def share(self, tell: Callable[[int], None], requests: int) -> Callable[[int], None]:
        """What is told of ended prompts, in requests: several may share a pass, or one need many."""
        ended = told = 0

        def advance(prompts: int) -> None:
            nonlocal ended, told
            ended += prompts
            reached = requests * ended // len(self._prompts)
            tell(reached - told)
            told = reached

        return advance

    def carry_out(
        self,
        llm: Any,
        loras: Mapping[str | None, Any],
        build: Callable[[str | None, _Prompt], Any],
        *,
        apart: bool,
        watch: Callable[..., Any] | None = None,
    ) -> None:
        """Run every prompt, each with its adapter, in one call of vLLM.

        ``build`` makes what vLLM takes. ``apart``: the base's in a call of their own. ``watch`` makes what vLLM takes
        for a progress bar.
        """
        self.results = [None] * len(self._prompts)
        for base in (True, False) if apart else (None,):
            numbers = [i for i, prompt in enumerate(self._prompts) if base is None or (prompt[0] is None) is base]
            if not numbers:
                continue
            requests = [loras[self._prompts[number][0]] for number in numbers]
            outputs = llm.generate(
                [build(*self._prompts[number][:2]) for number in numbers],
                sampling_params=[self._prompts[number][2] for number in numbers],
                lora_request=requests if any(requests) else None,
                use_tqdm=watch or False,
            )
            for number, output in zip(numbers, outputs, strict=True):
                self.results[number] = output


class _Watch:
    """What vLLM takes for a bar of tqdm: it shows nothing, and tells how many more prompts have ended.

    vLLM makes one over the prompts that it tokenises, which are no answers, and one that it updates.
    """

    def __init__(self, tell: Callable[[int], None], items: Iterable[Any] = (), **settings: Any) -> None:
        self._tell, self._items = tell, items
        self.n, self.postfix = 0, ""
        # vLLM divides by it.
        self.format_dict = {"elapsed": 1.0}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def update(self, more: int = 1) -> None:
        self.n += more
        self._tell(more)

    def refresh(self) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing is open."""


def _scored(row: Mapping[int, Any], token: int) -> tuple[float, bool]:
    """Log-probability of a prompt token, and whether it is the argmax; of equals the lowest id is, as in torch."""
    best = max(entry.logprob for entry in row.values())
    # What is not a number equals nothing; the sum then says so.
    first = min((i for i, entry in row.items() if entry.logprob == best), default=token)
    return float(row[token].logprob), token == first


def _total(scored: Sequence[tuple[float, bool]]) -> Output:
    return Output(
        logprob=sum(logprob for logprob, _ in scored),
        is_greedy=all(greedy for _, greedy in scored),
        batch_dependent=True,
    ).checked()
