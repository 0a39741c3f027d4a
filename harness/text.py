"""Text that may come from anybody, made safe to be shown."""

from __future__ import annotations

import re

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
