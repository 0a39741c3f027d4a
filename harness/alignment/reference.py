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

Row = Mapping[str, Any]
Logps = dict[str, float]
"""Log-probability of each answer of a row, by name: ``chosen`` and ``rejected`` of a pair, else ``completion``."""


def answers_of(row: Row) -> tuple[str, ...]:
    """Names of a tokenised row's answers: those of a pair, or the one of any other."""
    return ("chosen", "rejected") if "chosen_ids" in row else ("completion",)


def row_digest(row: Row) -> str:
    """Identity of a tokenised row: its lists of ids, and which tokens of an answer that is no pair's carry loss."""
    hashed = hashlib.sha256()
    answers = answers_of(row)
    more = () if len(answers) == 2 else ("labels_mask",)
    for key in ("prompt_ids", *(f"{name}_ids" for name in answers), *more):
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
        rows: Sequence[Row],
        compute: Callable[[Sequence[Row]], list[Logps]],
        advance: Callable[[int], None] = lambda more: None,
    ) -> tuple[list[Logps], int]:
        """Log-probabilities of every row's answers, and how many rows had to be computed.

        Args:
            rows: tokenised, all pairs or none.
            compute: log-probabilities (nats, summed over the answer) of one batch under the starting policy.
            advance: told how many more rows are there.
        """
        digests = [row_digest(row) for row in rows]
        with self._locked() as journal:
            known: dict[str, Logps] = {}
            for batch in journal.recover()[0]:
                known.update({entry.pop("row"): entry for entry in map(dict, batch)})
            distinct = dict(zip(digests, rows, strict=True))
            missing = {digest: row for digest, row in distinct.items() if digest not in known}
            stored(advance, len(distinct) - len(missing))
            order = list(missing)
            for indices in plan([missing[digest] for digest in order]):
                names = [order[i] for i in indices]
                values = compute([missing[name] for name in names])
                found = dict(zip(names, values, strict=True))
                journal.append([{"row": name, **logps} for name, logps in found.items()])
                known.update(found)
                advance(len(found))
        return [known[digest] for digest in digests], len(missing)


def plan(rows: Sequence[Row], budget: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of rows in batches: by length, longest first, within a budget of padded tokens (of all answers)."""
    names = answers_of(rows[0]) if rows else ()
    width = [len(row["prompt_ids"]) + max(len(row[f"{name}_ids"]) for name in names) for row in rows]
    batches: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda i: (-width[i], i)):
        if batches and len(names) * width[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def row_scorer(model: Any, tokenizer: Any, *, bf16: bool = False) -> Callable[[Sequence[Row]], list[Logps]]:
    """Log-probabilities of answers under a model as it is now (the caller switches adapters), without gradient.

    Args:
        model: its mode and adapters are left as they were.
        tokenizer: for the padding token.
        bf16: whether training runs under bf16 autocast: then so does this, or the first ratios would not be 1.
    """
    import torch
    from trl.trainer import add_fused_lm_head

    from harness.alignment.driver import out_of_memory
    from harness.alignment.labels import project_labels_alone

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(base)
    project_labels_alone(base)
    pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def score(rows: Sequence[Row]) -> list[Logps]:
        try:
            return at_once(rows)
        except Exception as error:
            if out_of_memory(error) is None or len(rows) == 1:
                raise
        # Not within `except`: there the traceback keeps what did not fit.
        half = len(rows) // 2
        return [*score(rows[:half]), *score(rows[half:])]

    def at_once(rows: Sequence[Row]) -> list[Logps]:
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
                return (_pairs if len(answers_of(rows[0])) == 2 else _answers)(model, rows, pad, base.device)
        finally:
            model.train(training)

    return score


def _pairs(model: Any, rows: Sequence[Row], pad: int, device: Any) -> list[Logps]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from harness.alignment.pairwise_trainer import pair_logps

    collate = DataCollatorForPreference(pad_token_id=pad)
    examples = [{key: list(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]
    logps = pair_logps(model, {key: value.to(device) for key, value in collate(examples).items()})
    both = zip(logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in both]


def _answers(model: Any, rows: Sequence[Row], pad: int, device: Any) -> list[Logps]:
    import torch

    from harness.alignment.labels import IGNORED

    def padded(sequences: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(one) for one in sequences]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    whole = [[*row["prompt_ids"], *row["completion_ids"]] for row in rows]
    shown = [
        [i if mask else IGNORED for i, mask in zip(ids, row["labels_mask"], strict=True)]
        for ids, row in zip(whole, rows, strict=True)
    ]
    outputs = model(
        input_ids=padded(whole, pad),
        attention_mask=padded([[1] * len(ids) for ids in whole], 0),
        labels=padded(shown, IGNORED),
        use_cache=False,
        fused_lm_head=True,
    )
    return [{"completion": value} for value in outputs.log_probs.float().sum(dim=1).tolist()]
