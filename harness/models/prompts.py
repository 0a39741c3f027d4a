"""Prompts as token ids: raw text with the tokenizer's own specials, or the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2

from harness.core.errors import UserError
from harness.core.records import Message
from harness.models.rendering import SECONDS, bounded, refuse_bombs, sandbox

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Task YAML comes from anyone's folder: its templates run in the sandbox, and an unknown field is an error.
_ENVIRONMENT = sandbox(jinja2.StrictUndefined)


@lru_cache(maxsize=256)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


def render(template: str, row: Mapping[str, Any], where: str) -> str:
    """A task's Jinja template over one row.

    Raises:
        UserError: the template is not Jinja, or names a field that the row has not.
    """
    try:
        return _compiled(template).render(dict(row))
    except (jinja2.TemplateError, UserError, RecursionError) as error:
        what = error.what if isinstance(error, UserError) else str(error)
        raise UserError(
            where, f"template {template!r}: {what}", f"Fields of a row: {', '.join(map(str, row))}."
        ) from None


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of raw text as lm-eval's HF model takes them.

    The tokenizer's default specials; none if the text already starts with BOS (or EOS, for a tokenizer without BOS).
    """
    _check_text(text)
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is not None and text.startswith(str(tokenizer.decode(prefix))):
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


def render_chats(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    template: str | None = None,
    answered: bool = False,
) -> list[str]:
    """Conversations as text, by the tokenizer's chat template or the one given.

    Args:
        tokenizer: whose BOS and EOS the template writes.
        conversations: turns with ``role`` and ``content``.
        template: Jinja text; the tokenizer's own when absent.
        answered: the conversation is whole; otherwise it ends where the assistant answers.

    Raises:
        jinja2.TemplateError: the template is broken, refuses a conversation, or does not come to its end.
    """
    chats = [[dict(message) for message in messages] for messages in conversations]
    if not chats:
        return []
    text = template if template is not None else tokenizer.chat_template
    if isinstance(text, str):
        refuse_bombs(text)
    with bounded("chat template", SECONDS + len(chats) / 10):
        rendered = tokenizer.apply_chat_template(
            chats, chat_template=template, tokenize=False, add_generation_prompt=not answered
        )
    return [str(text) for text in rendered]


def encode_rendered(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered conversations; the template has written BOS where it wants one, so none is added."""
    if not texts:
        return []
    for text in texts:
        _check_text(text)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[int(i) for i in ids] for ids in encoded["input_ids"]]


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text[max(0, error.start - 40) : error.end + 10]
        what = f"half a surrogate pair, which no tokenizer takes: {shown!r}"
        raise UserError("prompt", what, "Mend that row of the data.") from None


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation_prompt: bool = True
) -> tuple[list[int], str]:
    """Token ids and text of a conversation up to the point where the assistant answers, or before its header.

    Training makes its prompts with the same two functions, so that evaluation sends what training saw.
    """
    text = render_chats(tokenizer, [messages], answered=not generation_prompt)[0]
    return encode_rendered(tokenizer, [text])[0], text


def check_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a prompt that starts with two BOS tokens: it is in no training text.

    Raises:
        UserError: naming the cause.
    """
    bos = tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        raise UserError(
            where,
            "the prompt starts with two BOS tokens",
            "The tokenizer adds one and the text or chat template writes another; mend one of them.",
        )
