"""An open model of the transformers engine: forward passes, generation, adapters, memory that runs out."""

from __future__ import annotations

import gc
import hashlib
import logging
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from harness import AdapterInfo, Decoding, ModelInfo, Output, Request, Session, UserError, nearest, soft_prompt
from harness_plugins.engines.transformers.load import is_out_of_memory, not_finite
from harness_plugins.engines.transformers.plan import Finite, Limits, Pace, Row, StopText, cut_at_stop, plan, refusal

if TYPE_CHECKING:
    import torch

LOGITS_PER_CHUNK = 2**26
"""Logits that are widened to fp32 at a time (256 MiB)."""

log = logging.getLogger(__name__)


class TransformersSession(Session):
    """An open model. See :class:`TransformersEngine` for what it promises."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        limits: Limits,
        adapters: Mapping[str, str],
        peft: Any,
        conditioned: Mapping[str | None, AdapterInfo | ModelInfo] | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: of transformers.
            tokenizer: of the model.
            limits: of a batch.
            adapters: their names -> names within ``peft``.
            peft: the PeftModel around ``model``, if there is one.
            conditioned: name of an adapter, None for the base -> what has its conditioning.
        """
        from transformers import GenerationConfig

        self._model, self._tokenizer, self._limits, self._adapters, self._peft = (
            model,
            tokenizer,
            limits,
            adapters,
            peft,
        )
        own = getattr(model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        self._eos: list[int] = sorted(ids)
        pad = tokenizer.pad_token_id
        self._pad: int = pad if pad is not None else (self._eos[0] if self._eos else 0)
        added = tokenizer.added_tokens_decoder
        special = {token for token, entry in added.items() if entry.special}
        self._invisible = frozenset(special | set(tokenizer.all_special_ids))
        # generate() fills every setting that we leave open from the model's own: penalties, top_k, minimum lengths.
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self._inexact = str(model.dtype) != "torch.float32"
        self._too_much: dict[int, int] = {}
        self._conditioned = conditioned or {}
        self._soft: dict[tuple[str | None, str], torch.Tensor] = {}
        self._unsound = not_finite(peft if peft is not None else model, adapters.values())
        self.facts = _facts(model, peft)

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """See :func:`plan`; limits count forward rows, of which one may answer several requests."""
        self._check(requests)
        return [[index for row in batch for index in row.members] for batch in self._plan(requests)]

    def run(self, requests: Sequence[Request]) -> list[Output]:
        """Answer one batch (a longer list is planned and run batch by batch)."""
        self._check(requests)
        outputs: dict[int, Output] = {}
        for batch in self._plan(requests):
            first = requests[batch[0].members[0]]
            unsound = self._problem(first.adapter)
            if unsound is not None or self._refusal(first) is not None:
                indices = [index for row in batch for index in row.members]
                outputs |= {i: Output(error=unsound or self._refusal(requests[i])) for i in indices}
                continue
            compute = self._generate if first.kind == "generate" else self._score
            with self._active(first.adapter):
                outputs |= self._attempt(batch, lambda rows, do=compute: do(rows, requests))  # type: ignore[misc]
        return [outputs[index] for index in range(len(requests))]

    def close(self) -> None:
        """Drop the model and give its memory back."""
        self._model = self._peft = None
        _release()

    def _plan(self, requests: Sequence[Request]) -> list[list[Row]]:
        return plan(requests, self._limits, self._virtual)

    def _refusal(self, request: Request) -> str | None:
        return refusal(request, self._limits, self._virtual(request))

    def _virtual(self, request: Request) -> int:
        return 0 if request.control is None else len(self._vectors(request.adapter, request.control))

    def _vectors(self, adapter: str | None, control: str) -> torch.Tensor:
        """The vectors that stand for a control, read once: (tokens, hidden size), in the model's type."""
        key = adapter, control
        if key not in self._soft:
            owner = self._conditioned.get(adapter)
            if owner is None:
                of = f"adapter {adapter}" if adapter is not None else "the model"
                raise UserError(f"--control {control}", f"{of} has no conditioning", "Leave --control out.")
            vectors = soft_prompt(owner, control)
            self._soft[key] = vectors.to(self._model.device, self._model.get_input_embeddings().weight.dtype)
        return self._soft[key]

    def _embedded(self, ids_BT: torch.Tensor, rows: Sequence[Row], adapter: str | None, *, left: bool) -> Any:
        """What stands for token ids where rows have virtual tokens: (rows, tokens, hidden size); None: none has.

        Of every other token it is the model's own embedding, so that plain rows come out the same.
        """
        if all(row.control is None for row in rows):
            return None
        words_BTD = self._model.get_input_embeddings()(ids_BT).clone()
        for number, row in enumerate(rows):
            if row.control is not None:
                vectors = self._vectors(adapter, row.control)
                start = row.control_at + (ids_BT.shape[1] - len(row.ids) if left else 0)
                words_BTD[number, start : start + len(vectors)] = vectors
        return words_BTD

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.adapter is not None and request.adapter not in self._adapters:
                close = nearest(request.adapter, self._adapters)
                known = f"Did you mean {close[0]!r}?" if close else f"Open: {', '.join(self._adapters) or 'none'}."
                raise UserError("Request.adapter", f"adapter {request.adapter!r} is not open", known)
            if request.control is not None:
                self._vectors(request.adapter, request.control)

    def _problem(self, adapter: str | None) -> str | None:
        """Why no answer of base or adapter means anything."""
        if None in self._unsound:
            return f"the model's {self._unsound[None]}"
        found = self._unsound.get(self._adapters[adapter]) if adapter is not None else None
        return f"adapter {adapter}: its {found}" if found is not None else None

    @contextmanager
    def _active(self, adapter: str | None) -> Iterator[None]:
        if self._peft is None:
            yield
        elif adapter is None:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(self._adapters[adapter], inference_mode=True)
            yield

    def _attempt(
        self, rows: list[Row], compute: Callable[[list[Row]], dict[int, Output]], split: bool = False
    ) -> dict[int, Output]:
        """Compute rows; when memory runs out, in halves, whose outputs are marked as batch-dependent."""
        import torch

        kind = min(rows[0].budget, 1)
        tokens = len(rows) * max(row.width for row in rows)
        reason = ""
        # What has failed once on this device is not tried again at that size.
        if len(rows) == 1 or tokens < self._too_much.get(kind, sys.maxsize):
            try:
                with torch.inference_mode():
                    outputs = compute(rows)
                mark = split or self._inexact
                return {i: replace(output, batch_dependent=mark) for i, output in outputs.items()}
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # Not within `except`: there the traceback still holds the tensors of the failed pass.
            _release()
            if len(rows) == 1:
                text = f"out of memory with a single request of {tokens} tokens: {reason}"
                return {index: Output(error=text) for index in rows[0].members}
            log.warning("out of memory with %d rows of %d tokens in all; going on with half", len(rows), tokens)
            self._too_much[kind] = tokens
        half = len(rows) // 2
        return self._attempt(rows[:half], compute, True) | self._attempt(rows[half:], compute, True)

    def _score(self, rows: list[Row], requests: Sequence[Request]) -> dict[int, Output]:
        """Log-likelihoods. Padding is on the right, where no scored token can see it."""
        import torch

        width = max(len(row.ids) for row in rows)
        padded = [row.ids + row.ids[-1:] * (width - len(row.ids)) for row in rows]
        ids_BT = torch.tensor(padded, device=self._model.device)
        at: list[tuple[int, int]] = []
        wanted: list[tuple[int, int]] = []  # index into `at`, token
        spans: list[tuple[int, int]] = []  # request, number of its tokens
        for number, row in enumerate(rows):
            at.extend((number, position) for position in range(len(row.ids) - row.scored, len(row.ids)))
            for index in row.members:
                tokens = requests[index].continuation_ids
                wanted.extend(zip(range(len(at) - len(tokens), len(at)), tokens, strict=True))
                spans.append((index, len(tokens)))
        words_BTD = self._embedded(ids_BT, rows, requests[rows[0].members[0]].adapter, left=False)
        logits_NV = self._logits(ids_BT, torch.tensor(at, device=ids_BT.device), words_BTD)
        chunks = torch.split(logits_NV, max(1, LOGITS_PER_CHUNK // logits_NV.shape[-1]))
        norm_N = torch.cat([torch.logsumexp(chunk.float(), -1) for chunk in chunks])
        best_N = torch.cat([chunk.argmax(-1) for chunk in chunks])
        index_W, token_W = torch.tensor(wanted, device=ids_BT.device).unbind(-1)
        logps = (logits_NV[index_W, token_W].float() - norm_N[index_W]).double().cpu()
        greedy = (best_N[index_W] == token_W).cpu()
        outputs: dict[int, Output] = {}
        start = 0
        for index, count in spans:
            logprob = float(logps[start : start + count].sum())
            if torch.isfinite(logps[start : start + count]).all():
                is_greedy = bool(greedy[start : start + count].all())
                outputs[index] = Output(logprob=logprob, is_greedy=is_greedy)
            else:
                outputs[index] = Output(error=f"the model's log-probability is not finite ({logprob})")
            start += count
        return outputs

    def _logits(self, ids_BT: torch.Tensor, at_N2: torch.Tensor, words_BTD: torch.Tensor | None) -> torch.Tensor:
        """Logits [N, V] at (row, position) pairs, of token ids or of what stands for them.

        The hidden states are gathered at the door of the output layer, so that no other logits are ever computed:
        transformers' ``logits_to_keep`` can only name columns, and rows of unequal length end in different ones. A
        model whose output layer is called in another way returns all logits, of which the wanted are taken.
        """
        row_N, position_N = at_N2.unbind(-1)

        def gather(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if args and args[0].shape[:2] == ids_BT.shape:
                return (args[0][row_N, position_N][None], *args[1:])
            return None

        head = self._model.get_output_embeddings()
        handle = head.register_forward_pre_hook(gather) if head is not None else None
        try:
            given = {"input_ids": ids_BT} if words_BTD is None else {"inputs_embeds": words_BTD}
            logits: torch.Tensor = self._model(**given, use_cache=False).logits
        finally:
            if handle is not None:
                handle.remove()
        return logits[0] if logits.shape[:2] == (1, len(at_N2)) else logits[row_N, position_N]

    def _generate(self, rows: list[Row], requests: Sequence[Request]) -> dict[int, Output]:
        """Generations, padded on the left; every row of a group has the same decoding and budget."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        decoding = requests[rows[0].members[0]].decoding or Decoding()
        width = max(len(row.ids) for row in rows)
        device = self._model.device
        ids_BT = torch.tensor([(self._pad,) * (width - len(row.ids)) + row.ids for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows], device=device)
        texts, ends = self._stops(decoding.stop)
        # top_k=0: left out, sampling would keep the 50 likeliest tokens.
        sampling = {} if decoding.greedy else {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=rows[0].budget,
            do_sample=not decoding.greedy,
            eos_token_id=ends or None,
            pad_token_id=self._pad,
            disable_compile=True,
            **sampling,
        )
        words_BTD = self._embedded(ids_BT, rows, requests[rows[0].members[0]].adapter, left=True)
        # Of vectors transformers returns what is new alone.
        start = width if words_BTD is None else 0
        stop = StopText(self._tokenizer, texts, start, self._invisible) if texts else None
        finite = Finite(start, ends[0] if ends else self._pad)
        pace = Pace(self.tell, sum(len(row.members) for row in rows), rows[0].budget)
        with _seeded(decoding, [requests[row.members[0]] for row in rows], device):
            all_BT = self._model.generate(
                **({"input_ids": ids_BT} if words_BTD is None else {"inputs_embeds": words_BTD}),
                attention_mask=mask_BT,
                generation_config=settings,
                logits_processor=LogitsProcessorList([finite]),
                stopping_criteria=StoppingCriteriaList([pace, *([stop] if stop else [])]),
            )
        outputs: dict[int, Output] = {}
        for number, (row, new, bad) in enumerate(zip(rows, all_BT[:, start:].tolist(), finite.first, strict=True)):
            ended = stop.ended.get(number) if stop else None
            output = self._finished(new, ended, frozenset(ends), texts, bad)
            outputs |= dict.fromkeys(row.members, output)
        return outputs

    def _finished(
        self, new: list[int], ended: int | None, ends: frozenset[int], texts: Sequence[str], bad: int
    ) -> Output:
        """The output of one row: what stands before EOS, or up to the token that completed a stop string.

        ``bad`` is the first token that was drawn from logits which are not finite: none, where the row had ended.
        """
        upto = len(new) if ended is None else ended
        eos = next((at for at, token in enumerate(new[:upto]) if token in ends), None)
        if bad < (upto if eos is None else eos + 1):
            return Output(error=f"the model's logits are not finite (token {bad + 1} of the answer)")
        ids = new[: upto if eos is None else eos]
        text, cut = cut_at_stop(self._tokenizer.decode(ids, skip_special_tokens=True), texts)
        finish: Literal["stop", "length"] = "stop" if cut or eos is not None or ended is not None else "length"
        return Output(text=text, token_ids=tuple(ids), finish=finish)

    def _stops(self, stops: Sequence[str]) -> tuple[list[str], list[int]]:
        """Stop strings to look for in the text, and token ids that end an answer.

        A stop string that is a special token (lm-eval appends the text of EOS) never shows in the text: it is an id.
        """
        named = {stop: self._tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop}
        special = {stop: token for stop, token in named.items() if token in self._invisible and self._is(token, stop)}
        return [stop for stop in named if stop not in special], sorted({*self._eos, *special.values()})

    def _is(self, token: int, text: str) -> bool:
        """Whether a token is the text; an unknown text is mapped to the unknown token, which is special too."""
        return bool(self._tokenizer.convert_ids_to_tokens(token) == text)


@contextmanager
def _seeded(decoding: Decoding, requests: Sequence[Request], device: torch.device) -> Iterator[None]:
    """Seed sampling from the decoding's seed and the batch's requests, and leave the process's generators alone."""
    if decoding.greedy:
        yield
        return
    import torch

    words = [str(decoding.seed or 0), *(request.digest for request in requests)]
    seed = int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _facts(model: Any, peft: Any) -> dict[str, Any]:
    import torch
    import transformers

    device = model.device
    facts = {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    if peft is not None:
        from peft import __version__ as peft_version

        facts["peft"] = peft_version
    return facts
