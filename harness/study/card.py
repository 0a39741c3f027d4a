"""The GPU that a study is planned for: its memory, and how fast it could multiply."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from harness.core.errors import UserError, unknown

GIB = 1024**3
UTILISATION = {"training": 0.35, "reading": 0.35, "writing": 0.05}
"""Share of a card's peak that is taken to be reached: model-FLOP utilisation as Chowdhery et al. 2022 define it (arXiv
2204.02311, section 4.1), who list 0.21 to 0.46 for large runs; writing token by token waits for memory. Our choice."""


@dataclass(frozen=True)
class Card:
    """One GPU."""

    name: str
    memory: int
    """Bytes."""
    tflops: float | None
    """Dense 16-bit matrix products a second at best, by the maker's data sheet (10^12); None: not known."""


_KNOWN = (
    ("T4", 16, 65), ("V100", 16, 125), ("V100", 32, 125), ("A10", 24, 125), ("L4", 24, 121), ("RTX-3090", 24, 71),
    ("RTX-4090", 24, 165), ("A100", 40, 312), ("A100", 80, 312), ("RTX-A6000", 48, 155), ("L40S", 48, 362),
    ("H100", 80, 989), ("H200", 141, 989),
)  # fmt: skip
CARDS = {f"{name}-{size}GB": Card(f"{name}-{size}GB", size * GIB, tflops) for name, size, tflops in _KNOWN}


def parse_memory(text: str, where: str) -> int:
    """``40GB`` in bytes; a GB has 2^30, as in the names of cards.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UserError(where, f"{text!r} is no size of memory", "Write for example 40GB.")
    return round(float(match[1]) * GIB)


def card_of(card: str | None, memory: str | None, resources: Any = None) -> Card | None:
    """The card that ``--card`` and ``--memory`` name, else the study's ``resources``; None where neither does.

    Raises:
        UserError: an unknown card, or no size.
    """
    where = "--card", "--memory"
    if card is None and memory is None and resources is not None:
        card, memory = (getattr(resources, name, None) for name in ("card", "memory"))
        where = "resources, card", "resources, memory"
    size = parse_memory(str(memory), where[1]) if memory is not None else None
    if card is None:
        return Card(f"a card of {size / GIB:g} GB", size, None) if size is not None else None
    found = CARDS.get(_spelt(card))
    if found is None:
        raise unknown(where[0], "card", card, CARDS, "harness study plan --help, and --memory 40GB for any other")
    return Card(found.name, size or found.memory, found.tflops)


def _spelt(name: str) -> str:
    return next((known for known in CARDS if known.lower() == name.lower()), name)


def card_named(names: Iterable[str]) -> Card | None:
    """The card that a driver's names stand for: ``NVIDIA A100-SXM4-40GB``; the smallest of its kind if unsized."""
    for name in names:
        for card in CARDS.values():
            if is_like(card, name):
                return card
    return None


def is_like(card: Card, driver: str) -> bool:
    """Whether a driver's name is that of such a card."""
    words = re.findall(r"[a-z0-9]+", driver.lower())
    kind, _, size = card.name.lower().rpartition("-")
    sizes = [word for word in words if re.fullmatch(r"\d+gb", word)]
    return all(part in words for part in kind.split("-")) and (not sizes or size in sizes)
