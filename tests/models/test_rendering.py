"""Templates from anybody come to an end, and reach nothing but what they are given."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import jinja2
import pytest

from harness.core.errors import UserError
from harness.models import rendering
from harness.models.chat_templates import bundled
from harness.models.prompts import encode_rendered, render, render_chats
from harness.models.rendering import bounded, refuse_bombs, sandbox

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_loop_is_interrupted_and_nothing_stays() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError) as caught, bounded("chat template x", seconds=0.3):
        jinja2.Template(LOOP).render()
    assert (caught.value.where, caught.value.what) == ("chat template x", "rendering took more than 0.3 s")
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_chat_template_that_loops(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr("harness.models.prompts.SECONDS", 0.3)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(UserError, match=r"chat template: rendering took more than 0\.4 s"):
        render_chats(tokenizer, [[{"role": "user", "content": "hello"}]], template=LOOP)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ 9 ** (9 ** 9) }}", "{{ 'a' * 10000000000 }}"])
def test_whatever_a_chat_template_raises_is_the_templates(tiny: Path, template: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(jinja2.TemplateError):
        render_chats(tokenizer, [[{"role": "user", "content": "hello"}]], template=template)


def test_bundled_chat_templates_pass() -> None:
    for name in bundled():
        refuse_bombs((Path(rendering.__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ 'a' * 10 ** 10 }}", "* makes more than 1,000,000 items or bits"),
        ("{{ [1] * 10 ** 10 }}", "* makes more than 1,000,000 items or bits"),
        ("{{ 9 ** (9 ** 9) }}", "** makes more than 1,000,000 items or bits"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
    ],
)
def test_a_tasks_template(template: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        render(template, {"a": 1}, "t.yaml, template, row 1")
    assert str(caught.value).startswith(f"t.yaml, template, row 1: template {template!r}: {what}")


def test_arithmetic_stays_what_it_is() -> None:
    assert (
        render("{{ a * 3 + 2 ** 5 }} {{ 'x' * 3 }} {{ [0] * 2 }} {{ 2.0 * 1.5 }}", {"a": 2}, "t") == "38 xxx [0, 0] 3.0"
    )


def test_a_sandbox_calls_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    with pytest.raises(jinja2.TemplateError):
        sandbox(jinja2.StrictUndefined).from_string(template).render()
    assert not canary.exists()


def test_half_a_surrogate_pair_is_no_prompt(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(UserError, match=r"prompt: half a surrogate pair, which no tokenizer takes: 'ab\\ud800'"):
        encode_rendered(tokenizer, ["ok", "ab\ud800"])
