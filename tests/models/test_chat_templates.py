"""Chat templates byte for byte, and which one a model gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.records import ModelInfo
from harness.core.specs import ModelSpec
from harness.models.chat_templates import ChatTemplate, bundled, resolve_template
from harness.models.inspect import inspect_model, open_tokenizer
from harness.steps.provenance import digest_of_bytes

shared = pytest.mark.skipif("HARNESS_SHARED" not in os.environ, reason="HARNESS_SHARED is unset")
OPENING = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


def model(template: str | None = None, name: str = "base", **config: Any) -> ModelInfo:
    given = {"num_attention_heads": 32, **config}
    return ModelInfo(
        ref=name,
        path="",
        name=name,
        config=given,
        architecture=given.pop("architecture", "LlamaForCausalLM"),
        max_length=given.pop("max_length", 2048),
        vocab_size=given.pop("vocab_size", 32000),
        weights_digest="w",
        tokenizer_digest="t",
        template_digest=digest_of_bytes(template.encode()) if template is not None else None,
        chat_template=template,
    )


def say(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [*([{"role": "system", "content": system}] if system is not None else []), *turns]


VICUNA: list[tuple[list[dict[str, str]], bool, str]] = [
    (say("p"), True, OPENING + "USER: p ASSISTANT:"),
    (say("p", "r"), False, OPENING + "USER: p ASSISTANT: r</s>"),
    (say("p", "r", "q"), True, OPENING + "USER: p ASSISTANT: r</s>USER: q ASSISTANT:"),
    (say("p", "r", "q", "s"), False, OPENING + "USER: p ASSISTANT: r</s>USER: q ASSISTANT: s</s>"),
    (say("p\n\n q", " r\n"), False, OPENING + "USER: p\n\n q ASSISTANT:  r\n</s>"),
    (say("p", "r", system="Be brief."), False, "Be brief. USER: p ASSISTANT: r</s>"),
]
MISTRAL: list[tuple[list[dict[str, str]], bool, str]] = [
    (say("p"), True, "[INST] p [/INST]"),
    (say("p", "r"), False, "[INST] p [/INST] r</s>"),
    (say("p", "r", "q"), True, "[INST] p [/INST] r</s>[INST] q [/INST]"),
    (say("p", "r", "q", "s"), False, "[INST] p [/INST] r</s>[INST] q [/INST] s</s>"),
    (say("p", "r", system="Be brief."), False, "[INST] Be brief.\n\np [/INST] r</s>"),
]


@pytest.mark.parametrize(
    ("name", "messages", "open_end", "text"),
    [*(("vicuna", *case) for case in VICUNA), *(("mistral", *case) for case in MISTRAL)],
)
def test_bundled_templates_byte_for_byte(name: str, messages: list[dict[str, str]], open_end: bool, text: str) -> None:
    template = resolve_template(model(), name)
    assert template.render(messages, add_generation_prompt=open_end) == text
    # BOS is the tokenizer's, once, in front.
    assert template.render(messages, bos="<s>", add_generation_prompt=open_end) == f"<s>{text}"


@pytest.mark.parametrize("name", ["vicuna", "mistral"])
@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "assistant", "system"], ["tool"]])
def test_turns_that_do_not_alternate_are_refused(name: str, roles: list[str]) -> None:
    with pytest.raises(UserError) as error:
        resolve_template(model(), name).render([{"role": role, "content": "x"} for role in roles])
    assert error.value.where == f"chat template {name}"
    assert "turns must alternate user, assistant" in error.value.what
    assert "--template mistral|vicuna|FILE" in error.value.fix


def test_the_models_own_template_comes_first() -> None:
    own = "{{ messages[0]['content'] }}"
    info = model(own, architecture="MistralForCausalLM")
    template = resolve_template(info)
    assert (template.name, template.source, template.note) == ("model", own, None)
    assert template.digest == info.template_digest
    assert resolve_template(info, "vicuna").name == "vicuna"


def test_bases_without_a_template() -> None:
    assert bundled() == ["mistral", "vicuna"]
    mistral = resolve_template(model(name="Mistral-7B-v0.1", architecture="MistralForCausalLM"))
    assert mistral.name == "mistral"
    assert mistral.note == (
        "Mistral-7B-v0.1 has no chat template of its own: mistral's is used, as it is a base of that family"
    )
    assert resolve_template(model(name="some-copy")).name == "vicuna"
    assert resolve_template(model(name="llama-13b", vocab_size=32064)).name == "vicuna"


@pytest.mark.parametrize(
    "config",
    [
        {"max_length": 4096},  # Llama 2
        {"num_key_value_heads": 4},  # TinyLlama
        {"vocab_size": 128256, "name": "Llama-3-8B"},
        {"architecture": "Qwen2ForCausalLM"},
    ],
)
def test_a_base_of_which_nothing_is_known_asks_for_a_template(config: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        resolve_template(model(**config))
    assert "the tokenizer has no chat template, and none is known for" in str(error.value)
    assert "--template mistral or --template vicuna, or the path of a .jinja file" in str(error.value)


def test_a_file_and_what_can_be_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    template = resolve_template(model(), str(path))
    assert template.name == "mine.jinja"
    assert template.render(say("a", "b")) == "<a><b>"
    assert template.digest == digest_of_bytes(path.read_bytes())
    with pytest.raises(UserError, match="Did you mean 'vicuna'"):
        resolve_template(model(), "vicunna")
    with pytest.raises(UserError, match="no such file"):
        resolve_template(model(), str(tmp_path / "other.jinja"))
    path.write_text(" \n")
    with pytest.raises(UserError, match="the file is empty"):
        resolve_template(model(), str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        resolve_template(model(), str(path))
    with pytest.raises(UserError, match=r"chat template broken:2"):
        ChatTemplate("broken", "{{ bos_token }}\n{% if %}").render(say("a"))


@shared
@pytest.mark.parametrize("name", ["vicuna", "mistral"])
def test_the_tokenizer_renders_the_same_bytes_and_one_bos(name: str) -> None:
    """By transformers' own door, with a real tokenizer."""
    info = inspect_model(ModelSpec(model=str(Path(os.environ["HARNESS_SHARED"]) / "models" / "tiny-base")))
    tokenizer = open_tokenizer(info)
    template = resolve_template(info, name)
    for messages, open_end, text in VICUNA if name == "vicuna" else MISTRAL:
        how = {"chat_template": template.source, "add_generation_prompt": open_end}
        assert tokenizer.apply_chat_template(messages, tokenize=False, **how) == f"<s>{text}"
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        # What the tokenizer itself makes of the text: it adds that one BOS.
        assert ids == tokenizer(text).input_ids


@shared
def test_the_bundled_vicuna_is_the_template_of_the_shared_model() -> None:
    info = inspect_model(ModelSpec(model=str(Path(os.environ["HARNESS_SHARED"]) / "models" / "tiny-instruct")))
    own, ours = resolve_template(info), resolve_template(info, "vicuna")
    assert own.name == "model"
    for messages, open_end, text in VICUNA[:5]:
        assert own.render(messages, add_generation_prompt=open_end) == text
        assert ours.render(messages, add_generation_prompt=open_end) == text


def test_nothing_heavy_is_imported() -> None:
    modules = (
        "harness.models.chat_templates, harness.data.tokenise, harness.data.selection, harness.data.preview, "
        "harness.cli.app, harness_plugins"
    )
    code = f"import {modules}, sys; from harness.contracts.registry import load_plugins; load_plugins(); "
    code += "assert not {'torch', 'transformers', 'datasets', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
