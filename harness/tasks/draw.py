"""Which samples of a task are asked under a limit: the first of each leaf task, or a draw that all arms share."""

from __future__ import annotations

import hashlib


def drawn(count: int, limit: int, leaf: str, seed: int) -> list[int]:
    """Places of a simple random sample without replacement of one leaf task, in their order.

    By the digest of seed, leaf and place, so that it is the same for every arm and on every machine, and a larger limit
    keeps what a smaller one has. Leaf tasks are strata: each is drawn from on its own.
    """
    ranked = sorted(range(count), key=lambda place: hashlib.sha256(f"{seed} {leaf} {place}".encode()).digest())
    return sorted(ranked[:limit])
