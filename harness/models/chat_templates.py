"""Chat templates: the model's own, a bundled one, or a file; resolved without loading anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import UserError, unknown
from harness.core.records import AdapterInfo, Message, ModelInfo
from harness.models.files import (
    TokenizerFile,
    read_checked,
    read_text,
)
from harness.models.rendering import bounded
from harness.steps.provenance import digest_of_bytes


def read_chat_template(path: Path) -> str | None:
    """The chat template of a tokenizer folder: chat_template.jinja, else the one in tokenizer_config.json.

    Raises:
        UserError: the file is not what it should be.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    settings = path / "tokenizer_config.json"
    template = read_checked(settings, TokenizerFile).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def with_template_of(model: ModelInfo, adapter: AdapterInfo) -> ModelInfo:
    """The model with the chat template that its adapter was trained with, where it has none of its own."""
    template = adapter.chat_template
    if template is None or model.chat_template is not None:
        return model
    return model.model_copy(update={"chat_template": template, "template_digest": digest_of_bytes(template.encode())})


_FOLDER = Path(__file__).parent / "templates"
_OPTION = "--template"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template as ``transformers`` understands it.

    A template writes ``bos_token`` itself, once, as chat templates do everywhere: whoever serves the adapter with the
    template beside it (this harness, transformers, vLLM) adds no special tokens to a rendered conversation.
    """

    name: str
    """``vicuna``, ``mistral``, ``model`` (the tokenizer's own) or the file's name."""
    source: str
    """The Jinja text."""
    note: str | None = None
    """Why it was chosen, where the user did not say."""

    @property
    def digest(self) -> str:
        """SHA-256 of the text: what ``ModelInfo.template_digest`` holds, and what the parity gate compares."""
        return digest_of_bytes(self.source.encode())

    def render(
        self, messages: Sequence[Message], *, bos: str = "", eos: str = "</s>", add_generation_prompt: bool = False
    ) -> str:
        """The text of one conversation, by the renderer of ``transformers``.

        Args:
            messages: turns with ``role`` (system, user, assistant) and ``content``.
            bos: text of the tokenizer's BOS token.
            eos: text of the tokenizer's EOS token.
            add_generation_prompt: end where the assistant answers.

        Raises:
            UserError: the template is not Jinja, or refuses the conversation.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with bounded(f"chat template {self.name}"):
                rendered = render_jinja_template(
                    [[dict(message) for message in messages]],
                    chat_template=self.source,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=bos,
                    eos_token=eos,
                )
        except jinja2.TemplateError as error:
            raise self.refusal(error) from None
        return str(rendered[0][0])

    def refusal(self, error: Exception) -> UserError:
        """The error for a template that is broken, or that refuses what it is given."""
        line = getattr(error, "lineno", None)
        where = f"chat template {self.name}" + (f":{line}" if line else "")
        return UserError(
            where, str(error), f"Mend the template, or give another: {_OPTION} {'|'.join(bundled())}|FILE."
        )


def bundled() -> list[str]:
    """Names of the templates that come with the harness."""
    return sorted(file.stem for file in _FOLDER.glob("*.jinja"))


def resolve_template(model: ModelInfo, given: str | None = None) -> ChatTemplate:
    """The template that training and evaluation of a model use.

    Args:
        model: as :func:`harness.inspect_model` finds it.
        given: a bundled name, the path of a ``.jinja`` file, or None: the model's own, else, for a base without one,
            Vicuna's for LLaMA-1 and Mistral's for Mistral (with a note).

    Raises:
        UserError: no such name or file; a base without a template of which nothing is known.
    """
    if given is not None:
        return _given(given)
    if model.chat_template is not None:
        return ChatTemplate("model", model.chat_template)
    name = _by_family(model)
    if name is None:
        raise UserError(
            f"{_OPTION} (model {model.name})",
            f"the tokenizer has no chat template, and none is known for {model.architecture}",
            f"Give one: {' or '.join(f'{_OPTION} {name}' for name in bundled())}, or the path of a .jinja file.",
        )
    note = f"{model.name} has no chat template of its own: {name}'s is used, as it is a base of that family"
    return ChatTemplate(name, _bundled_source(name), note)


def _given(given: str) -> ChatTemplate:
    if given in bundled():
        return ChatTemplate(given, _bundled_source(given))
    path = Path(given).expanduser()
    if not path.is_file():
        if path.suffix == ".jinja" or "/" in given:
            raise UserError(
                f"{_OPTION} {given}", "no such file", f"Give a .jinja file, or one of: {', '.join(bundled())}."
            )
        raise unknown(f"{_OPTION} {given}", "chat template", given, bundled(), "ls harness/models/templates")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{_OPTION} {given}", f"cannot be read: {error}", "Give a text file in UTF-8.") from None
    if not source.strip():
        raise UserError(f"{_OPTION} {given}", "the file is empty", "Give a Jinja chat template.")
    return ChatTemplate(path.name, source)


def _bundled_source(name: str) -> str:
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _by_family(model: ModelInfo) -> str | None:
    """LLaMA-1 is told by its shape, as its copies go by many names; Mistral by its architecture."""
    if model.architecture == "MistralForCausalLM":
        return "mistral"
    config = model.config
    heads = config.get("num_attention_heads")
    first_llama = (
        model.architecture.lower() == "llamaforcausallm"
        and model.vocab_size in (32000, 32001)
        and model.max_length == 2048
        and config.get("num_key_value_heads", heads) == heads
        and not config.get("rope_scaling")
    )
    named = re.search(r"(^|[-_/])llama-?(1-?)?(7|13|30|33|65)b", model.name.lower()) is not None
    return "vicuna" if first_llama or (named and model.architecture.lower() == "llamaforcausallm") else None
