"""Numbers and foreign texts as text that is safe to show.

Model output is adversarial by design, so every text goes through :func:`visible` before it reaches a terminal, a page
or Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Written out because asking unicodedata about every code point costs 0.15 s at import; a test does ask it.
_FORMAT = (
    "\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
) + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(1, 17))
HIDDEN_IN_TEXT = re.compile(f"([\x00-\x08\x0b-\x1f{_FORMAT}])\\1*")
HIDDEN_IN_LINE = re.compile(f"([\x00-\x1f{_FORMAT}])\\1*")


def code_point(match: re.Match[str]) -> str:
    """Name of a run of one hidden character: ``U+202E``, ``U+0000 x12``."""
    times = len(match.group())
    return f"U+{ord(match.group()[0]):04X}" + (f" ×{times}" if times > 1 else "")


def visible(text: str, *, lines: bool = False) -> str:
    """Replace what could steer a terminal or reorder text by visible code points such as ``⟨U+202E⟩``.

    Covers the Unicode categories Cc, Cf, Cs, Zl and Zp, and noncharacters. ``lines`` keeps line feeds and tabs.
    """
    if lines:
        text = text.replace("\r\n", "\n")
    pattern = HIDDEN_IN_TEXT if lines else HIDDEN_IN_LINE
    return pattern.sub(lambda match: f"⟨{code_point(match)}⟩", text)


_FOLDERS = re.compile(r"(?<![\w/:.~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"/\\:,()]+[/\\])*(?=[^\s'\"/\\:,()])")


def clip(text: str, limit: int, *, tail: float = 0.0) -> str:
    """Shorten a text to about ``limit`` characters and say so; ``tail`` is the share of them kept at the end."""
    if len(text) <= limit:
        return text
    end = int(limit * tail)
    mark = f" […{len(text) - limit:,} characters left out…] "
    return text[: limit - end] + mark + (text[-end:] if end else "")


def first_line(text: str) -> str:
    """The first line of a text; an empty text has one, too."""
    return text.partition("\n")[0]


def portable(value: Any) -> Any:
    """The same data with the folders of absolute paths taken off, so that a report can be published."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {portable(str(key)): portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    return value


MINUS = "−"
ARROWS = {True: "↑", False: "↓", None: ""}
DIGITS, MOST_DIGITS = 3, 12
"""Decimals of a number, as a rule and at most."""


def number(value: float | None, *, minus: str = "-", digits: int = DIGITS) -> str:
    """A number with three decimals (more where it would round to 0, fewer where it is large), or as many as told."""
    if value is None:
        return "–"
    size = abs(value)
    if digits > DIGITS:
        text = f"{value:,.{digits}f}"
    else:
        text = f"{value:.1e}" if 0 < size < 0.0005 else f"{value:,.1f}" if size >= 10_000 else f"{value:.3f}"
    return text.replace("-", minus)


def task_label(task: str, variant: str) -> str:
    """Task with its prompt variant."""
    return visible(task if task.endswith(f":{variant}") else f"{task}:{variant}")


def human_bytes(count: float) -> str:
    """A size in the unit that suits it: ``1.4 GB`` (10^9 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def human_seconds(seconds: float) -> str:
    """A duration in two units: ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
