"""Log-probabilities under the starting policy: computed once per (policy, template, row), kept, used by every seed.

TRL's own cache key contains the adapter's random initialisation, so it never hits across seeds (trl #3985). Here the
key is what the numbers depend on: base weights, start adapter, quantisation, dtype, and the token ids of the row (which
template, tokenizer and lengths have gone into).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.caches import cache_folder
from harness.core.progress import stored
from harness.core.records import digest_of
from harness.steps.files import writing
from harness.steps.journal import Journal

BATCH_TOKENS = 16_384
"""Padded tokens of one forward pass; the plan depends on the rows alone, so an interrupted pass meets it again."""

PairRow = Mapping[str, Any]


def row_digest(row: PairRow) -> str:
    """Identity of a tokenised pair: its three lists of ids."""
    hashed = hashlib.sha256()
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids = array("i", row[key])
        hashed.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return hashed.hexdigest()[:32]


@dataclass(frozen=True)
class ReferenceStore:
    """The cache of one starting policy."""

    path: Path

    @classmethod
    def of(cls, policy: Mapping[str, Any]) -> ReferenceStore:
        """The store of a policy, in the user's cache folder."""
        return cls(cache_folder() / "reference" / f"{digest_of(dict(policy))[:32]}.jsonl.gz")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Journal]:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            opened = self.path.with_suffix(".lock").open("w")
        with opened as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            journal = Journal(self.path)
            try:
                yield journal
            finally:
                journal.close()

    def fill(
        self,
        rows: Sequence[PairRow],
        compute: Callable[[Sequence[PairRow]], list[tuple[float, float]]],
        advance: Callable[[int], None] = lambda more: None,
    ) -> tuple[list[tuple[float, float]], int]:
        """(chosen, rejected) log-probability of every row, and how many had to be computed.

        Args:
            rows: tokenised pairs.
            compute: log-probabilities (nats, summed over the answer) of one batch under the starting policy.
            advance: told how many more rows are there.
        """
        digests = [row_digest(row) for row in rows]
        with self._locked() as journal:
            known: dict[str, tuple[float, float]] = {}
            for batch in journal.recover()[0]:
                known.update({entry["row"]: (entry["chosen"], entry["rejected"]) for entry in batch})
            distinct = dict(zip(digests, rows, strict=True))
            missing = {digest: row for digest, row in distinct.items() if digest not in known}
            stored(advance, len(distinct) - len(missing))
            order = list(missing)
            for indices in plan([missing[digest] for digest in order]):
                names = [order[i] for i in indices]
                values = compute([missing[name] for name in names])
                found = dict(zip(names, values, strict=True))
                journal.append([{"row": n, "chosen": c, "rejected": r} for n, (c, r) in found.items()])
                known.update(found)
                advance(len(found))
        return [known[digest] for digest in digests], len(missing)


def plan(rows: Sequence[PairRow], budget: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of rows in batches: by length, longest first, within a budget of padded tokens (both answers)."""
    width = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: (-width[i], i)):
        if batches and 2 * width[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pair_scorer(
    model: Any, tokenizer: Any, *, bf16: bool = False
) -> Callable[[Sequence[PairRow]], list[tuple[float, float]]]:
    """Log-probabilities of pairs under a model as it is now (the caller switches adapters), without gradient.

    Args:
        model: its mode and adapters are left as they were.
        tokenizer: for the padding token.
        bf16: whether training runs under bf16 autocast: then so does this, or the first ratios would not be 1.
    """
    import torch
    from trl.trainer import add_fused_lm_head
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from harness.alignment.driver import out_of_memory
    from harness.alignment.labels import project_labels_alone
    from harness.alignment.pairwise_trainer import pair_logps

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(base)
    project_labels_alone(base)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collate = DataCollatorForPreference(pad_token_id=pad)

    def score(rows: Sequence[PairRow]) -> list[tuple[float, float]]:
        try:
            return at_once(rows)
        except Exception as error:
            if out_of_memory(error) is None or len(rows) == 1:
                raise
        # Not within `except`: there the traceback keeps what did not fit.
        half = len(rows) // 2
        return [*score(rows[:half]), *score(rows[half:])]

    def at_once(rows: Sequence[PairRow]) -> list[tuple[float, float]]:
        examples = [{key: list(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]
        inputs = {key: value.to(base.device) for key, value in collate(examples).items()}
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
                logps = pair_logps(model, inputs)
        finally:
            model.train(training)
        return list(zip(logps.chosen.tolist(), logps.rejected.tolist(), strict=True))

    return score
