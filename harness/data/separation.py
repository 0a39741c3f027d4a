"""Training apart from held-out rows, by prompt: what is held out, and what is too near to that to be trained on.

It is training that loses such rows, so that the held-out ones of a data set are the same for every arm. Two prompts are
near where the sets of their word 5-grams have a Jaccard index (intersection over union; Broder 1997) of 0.8 or more.
Case and punctuation do not count, nor do system messages, which whole data sets share.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from harness.contracts.dataset import DatasetRow
from harness.core.records import digest_of

HELDOUT_SHARE = 0.1
"""Share of prompts held out of a data set without an official held-out split."""
LENGTH = 5
"""Words of a gram; a shorter prompt is a single gram."""
THRESHOLD = Fraction(4, 5)
"""Least Jaccard index of two prompts that are near."""
SAME = "its prompt is held out"
NEAR = f"its prompt is nearly a held-out one (Jaccard index of word {LENGTH}-grams {float(THRESHOLD)} or more)"
_WORD = re.compile(r"\w+")

Grams = set[tuple[str, ...]]


def prompt_key(row: DatasetRow) -> str:
    """Identity of a row's prompt; text is one user turn."""
    prompt = row.data.get("prompt", row.data)
    return digest_of([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def is_held_out(key: str, share: float = HELDOUT_SHARE) -> bool:
    """Whether a prompt is held out where there is no official split; the seed of an arm changes nothing about it."""
    return int(hashlib.sha256(f"held out\0{key}".encode()).hexdigest()[:13], 16) / 16**13 < share


class HeldOut:
    """Held-out rows, and whether another row is too near to one of them to be trained on."""

    def __init__(self, rows: Sequence[DatasetRow]) -> None:
        self._keys = {prompt_key(row) for row in rows}
        self._prompts = NearPrompts(row.data.get("prompt") for row in rows)

    def objection(self, row: DatasetRow) -> str | None:
        """Why a row cannot be trained on; None where it can."""
        if prompt_key(row) in self._keys:
            return SAME
        return NEAR if self._prompts.near(row.data.get("prompt")) else None


class NearPrompts:
    """An index over prompts that tells whether another prompt is near to one of them."""

    def __init__(self, prompts: Iterable[Any]) -> None:
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            grams = grams_of(prompt)
            self._sizes.append(len(grams))
            for gram in grams:
                self._holders.setdefault(gram, []).append(number)

    def near(self, prompt: Any) -> bool:
        """Whether the prompt is near to one of those indexed."""
        grams = grams_of(prompt)
        common = grams & self._holders.keys()
        # The intersection is at most what they have in common, and the union at least as large as either.
        if not common or len(common) < THRESHOLD * len(grams):
            return False
        shared = Counter(number for gram in common for number in self._holders[gram])
        return any(count >= THRESHOLD * (len(grams) + self._sizes[number] - count) for number, count in shared.items())


def grams_of(prompt: Any) -> Grams:
    """The word 5-grams of text or of chat messages; none of anything else, or where there is no word."""
    words = _WORD.findall(_text(prompt).casefold())
    if len(words) < LENGTH:
        return {tuple(words)} if words else set()
    return set(zip(*(words[start:] for start in range(LENGTH)), strict=False))


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    messages = prompt if isinstance(prompt, Sequence) else ()
    turns = (one for one in messages if isinstance(one, Mapping) and one.get("role") != "system")
    return "\n".join(str(turn.get("content", "")) for turn in turns)
