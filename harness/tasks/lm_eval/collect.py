"""lm-eval's requests as ours: a ``TemplateLM`` that keeps the token ids it is asked about.

So prompts, BOS, the split of context and continuation, and truncation are lm-eval's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.errors import StepError, UserError
from harness.core.records import Message, ModelInfo, Request
from harness.core.specs import Decoding
from harness.models.rendering import bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_NEW_TOKENS = 256
"""lm-eval's ``max_gen_toks`` for models of transformers."""
_OPTIONAL_KEYS = {"until", "do_sample", "temperature", "top_p", "max_length"}


def decoding_of(kwargs: Mapping[str, Any], default_max: int, where: str) -> Decoding:
    """lm-eval's ``generation_kwargs`` as ours.

    Raises:
        StepError: a key that the engines do not know; it would otherwise be ignored in silence.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    plain = normalize_gen_kwargs(dict(kwargs), default_max)
    unknown = set(plain) - _OPTIONAL_KEYS - {"max_gen_toks"}
    if unknown:
        raise StepError(where, f"generation_kwargs {', '.join(sorted(unknown))} are not supported")
    until = plain.get("until") or []
    sampled = bool(plain.get("do_sample"))
    return Decoding(
        max_new_tokens=int(plain["max_gen_toks"]),
        temperature=float(plain.get("temperature") or 0.0) if sampled else 0.0,
        top_p=float(plain.get("top_p") or 1.0),
        stop=tuple(dict.fromkeys(text for text in ([until] if isinstance(until, str) else until) if text)),
    )


class Conversation(str):
    """A conversation as the text that lm-eval hands on, which remembers its turns."""

    messages: tuple[Message, ...] = ()

    @classmethod
    def of(cls, text: str, history: Sequence[Message]) -> Conversation:
        """The text of a history."""
        made = cls(text)
        made.messages = tuple(dict(message) for message in history)
        return made


def _needs_tokens(task: str) -> UserError:
    return UserError(
        f"--task {task}",
        "asks for log-likelihoods, which need the model's tokenizer and an endpoint that gives them",
        "Set engine.endpoint=completions and engine.tokenizer, or take a task that generates.",
    )


def collector(model: ModelInfo, tokenizer: PreTrainedTokenizerBase | None, max_new_tokens: int | None) -> Any:
    """A ``TemplateLM`` that keeps the token ids it is asked about instead of computing anything.

    Without a tokenizer it keeps conversations, and refuses whatever is no conversation.

    Defined in here because its base class is heavy to import.
    """
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    from harness.models.prompts import encode

    class Collector(TemplateLM):  # type: ignore[misc]  # mypy does not follow lm-eval
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self._requests: list[Request] = []
            self._cut = False
            self._memory: dict[str, list[int]] = {}

        @property
        def eot_token_id(self) -> int:
            assert tokenizer is not None
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            assert tokenizer is not None
            bos = tokenizer.bos_token_id
            return int(bos if bos is not None else tokenizer.eos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return model.tokenizer_digest[:16]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            assert tokenizer is not None
            if add_special_tokens is not None:
                return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))
            # The choices of a question share their context: encode it once per document.
            if string not in self._memory:
                self._memory[string] = encode(tokenizer, string)
            return self._memory[string]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if tokenizer is None:
                text = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in chat_history)
            else:
                with bounded("chat template"):
                    rendered = tokenizer.apply_chat_template(
                        chat_history,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        continue_final_message=not add_generation_prompt,
                    )
                text = str(rendered)
            return Conversation.of(text, chat_history)

        def collect(self, item: Any) -> None:
            self._requests, self._cut, self._memory = [], False, {}
            for instance in item.instances:
                repeats = []
                for repeat in range(instance.repeats or 1):
                    start = len(self._requests)
                    if instance.request_type == "generate_until":
                        self._generate(instance, repeat)
                    elif tokenizer is None:
                        raise _needs_tokens(instance.task_name)
                    else:
                        getattr(self, instance.request_type)([instance], disable_tqdm=True)
                    repeats.append(range(start, len(self._requests)))
                item.spans.append(repeats)

        def take(self) -> tuple[list[Request], bool]:
            return self._requests, self._cut

        def _generate(self, instance: Any, repeat: int) -> None:
            context, kwargs = instance.args[0], instance.args[1]
            decoding = decoding_of(kwargs, DEFAULT_MAX_NEW_TOKENS, instance.task_name)
            if max_new_tokens is not None:
                decoding = decoding.model_copy(update={"max_new_tokens": max_new_tokens})
            if not decoding.greedy:
                decoding = decoding.model_copy(update={"seed": repeat})
            messages = context.messages if isinstance(context, Conversation) else None
            if tokenizer is None:
                if messages is None:
                    raise _needs_tokens(instance.task_name)
                self._requests.append(Request("generate", (), decoding=decoding, prompt=context, messages=messages))
                return
            ids = self.tok_encode(context)
            room = model.max_length - decoding.max_new_tokens
            if room <= 0:
                raise UserError(
                    f"--task {instance.task_name}",
                    f"asks for {decoding.max_new_tokens} new tokens, and the model's context is {model.max_length}",
                    "Lower it with --set TASK.lm_eval.max_new_tokens=N.",
                )
            self._cut |= len(ids) > room
            # Engines send the ids; a chat endpoint, which knows the template itself, the turns.
            ids = ids[-room:]
            self._requests.append(Request("generate", tuple(ids), decoding=decoding, prompt=context, messages=messages))

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            for texts, context_ids, continuation_ids in requests:
                # The last token is scored, never fed: a context of max_length + 1 tokens fits.
                whole = (context_ids + continuation_ids)[-(model.max_length + 1) :]
                self._cut |= len(whole) < len(context_ids) + len(continuation_ids)
                split = len(whole) - len(continuation_ids)
                if split < 1:
                    raise StepError("lm-eval", f"a continuation of {len(continuation_ids)} tokens exceeds the context")
                context, continuation = texts or ("", "")
                self._requests.append(
                    Request(
                        "loglikelihood",
                        tuple(whole[:split]),
                        tuple(whole[split:]),
                        prompt=context,
                        continuation=continuation,
                    )
                )
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            for (string,) in (request.args for request in requests):
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(string),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=model.max_length,
                    context_len=1,
                )
                self._loglikelihood_tokens([(None, *utils.make_disjoint_window(window)) for window in windows])
            return [0.0] * len(requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("collected one by one, with the repeat's seed")

    return Collector()
