"""What all pages share: one style sheet and one script by digest, and texts that cannot become markup.

A page is one file that opens from a disk, alone. Its Content-Security-Policy allows its own style sheet and script, by
digest, and nothing else. Where samples lie beside it, `'strict-dynamic'` lets that one script load them: of what was
tried from `file://` (Chromium 156, Firefox 153) it is the narrowest that works. Digests of the side files do not, as
`integrity` wants CORS, which a file has not; `'self'` and `file:` would let any markup that slipped through load them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.text import HIDDEN_IN_LINE, HIDDEN_IN_TEXT, code_point

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

ASSETS = Path(__file__).with_name("assets")
BASE_STYLE = ASSETS / "page.css"


def source(text: str) -> str:
    """A style sheet or script as a source of a policy: its SHA-256 (Content Security Policy 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def policy(style: str, script: str = "", *, side_files: bool = False) -> str:
    """The Content-Security-Policy of a page. ``side_files``: its script may load more of them."""
    scripts = f" script-src {source(script)}{' ' + DYNAMIC if side_files else ''};" if script else ""
    return f"default-src 'none'; style-src {source(style)};{scripts} img-src data:; base-uri 'none'; form-action 'none'"


DYNAMIC = "'strict-dynamic'"


@cache
def environment() -> Environment:
    """Templates of all pages; everything that is put into one is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["line"] = line_html
    made.filters["count"] = "{:,}".format
    return made


def render_page(
    template: str,
    *,
    styles: Sequence[str] = (),
    more_style: str = "",
    scripts: Sequence[str] = (),
    side_files: bool = False,
    **values: Any,
) -> str:
    """A page from a template of the assets, its style sheets and scripts in it. Equal values give equal bytes."""
    from markupsafe import Markup

    style = "".join((ASSETS / name).read_text(encoding="utf-8") for name in (BASE_STYLE.name, *styles)) + more_style
    script = "".join((ASSETS / name).read_text(encoding="utf-8") for name in scripts)
    return (
        environment()
        .get_template(template)
        .render(
            **values, policy=policy(style, script, side_files=side_files), style=Markup(style), script=Markup(script)
        )
    )


def line_html(value: Any) -> Markup:
    """Escape a text of one line (a name, a note); hidden characters become code points that stand out from it."""
    from markupsafe import Markup, escape

    text = str(value)
    parts: list[str] = []
    start = 0
    for match in HIDDEN_IN_LINE.finditer(text):
        parts += [escape(text[start : match.start()]), f'<span class="cp">{code_point(match)}</span>']
        start = match.end()
    parts.append(escape(text[start:]))
    return Markup("".join(parts))


def pieces(text: str) -> str | list[str]:
    """A text of many lines for a page's script: as it is, or cut at its hidden characters.

    Every other piece, from the second on, is the code point of a hidden character; the script makes text nodes of them.
    """
    text = text.replace("\r\n", "\n")
    found: list[str] = []
    start = 0
    for match in HIDDEN_IN_TEXT.finditer(text):
        found += [text[start : match.start()], code_point(match)]
        start = match.end()
    return [*found, text[start:]] if found else text


def script_json(value: Any) -> str:
    """JSON that may stand in a script element or be a script: ASCII, and nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
