"""What every seed and hyper-parameter shares of the data: which rows a selection has, and their token ids.

Two kinds of files in the cache folder. ``selections/``: what came of reading a pinned data set, as counts and digests
of rows. ``tokens/``: those rows as token ids. Both for one tokenizer, template, length and mask, which decide what can
be trained on. A file that is damaged, or not there, costs the work again, never a result.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.contracts.dataset import DatasetRow
from harness.core.caches import cache_folder
from harness.core.errors import CorruptionError, UserError
from harness.core.records import digest_of
from harness.data.selection import Keep, Selection, selection_digest
from harness.data.tokenise import Tokenised
from harness.steps.files import read_json, write_bytes
from harness.steps.journal import rows_digest, write_rows
from harness.steps.provenance import NUMERICS

Side = str
"""``train`` or ``heldout``."""


@dataclass
class Prepared:
    """The rows of one alignment, tokenised."""

    selection: Selection
    """Its lists of rows are empty where ``read`` is False."""
    train: Tokenised
    heldout: Tokenised | None
    read: bool
    """Whether the data set had to be read."""
    tokenised: int
    """Rows that had to be tokenised; the others were known."""


class Tokenising(Protocol):
    """What makes token ids of rows: a ``harness.data.tokenise.Tokeniser``."""

    def keep(self, rows: Sequence[DatasetRow]) -> Collection[str]:
        """Tokenise rows; ids of those that can be trained on."""

    def finish(self, ids: Sequence[str] | None = None) -> Tokenised:
        """The rows of these ids, or all that were kept."""


@dataclass
class _Counted:
    """Passes rows on, and counts them."""

    keep: Keep
    rows: int = 0

    def __call__(self, rows: Sequence[DatasetRow]) -> Collection[str]:
        self.rows += len(rows)
        return self.keep(rows)


@dataclass(frozen=True)
class TokenCache:
    """The cache for one selection and one way of tokenising."""

    selected: Mapping[str, Any]
    """Selection identity and code of its data sets; empty: nothing pins the rows, so they are read each time."""
    how: Mapping[str, Any]
    """Tokenizer digest, template digest, length, loss mask, schema."""

    def prepare(self, select: Callable[[Keep], Selection], tokeniser: Callable[[], Tokenising]) -> Prepared:
        """The rows as token ids, with as little work as what is known allows.

        Args:
            select: reads the data set, and tells by token ids which of its rows can be trained on.
            tokeniser: makes a new one.
        """
        known = self._known_selection()
        if known is not None:
            selection, digests = known
            found = {side: self._read(digest) for side, digest in digests.items()}
            ready = {side: tokens for side, tokens in found.items() if tokens is not None}
            if len(ready) == len(digests):
                return Prepared(selection, ready["train"], ready.get("heldout"), read=False, tokenised=0)
        train, held = tokeniser(), tokeniser()
        counted = _Counted(train.keep)
        selection = select(counted)
        made = {"train": train.finish([row.id for row in selection.train])}
        # Of the same rows, more or fewer may have been passed over.
        digests = {"train": digest_of([selection_digest(selection.train), made["train"].rejected])}
        self._write(digests["train"], made["train"])
        if selection.heldout:
            digests["heldout"] = selection_digest(selection.heldout)
            tokens = self._read(digests["heldout"])
            if tokens is None:
                counted.rows += len(selection.heldout)
                held.keep(selection.heldout)
                tokens = held.finish()
                self._write(digests["heldout"], tokens)
            made["heldout"] = tokens
        self._remember(selection, digests)
        return Prepared(selection, made["train"], made.get("heldout"), read=True, tokenised=counted.rows)

    # --------------------------------------------------------------------------------------------------- selections

    @property
    def _index(self) -> Path:
        return cache_folder() / "selections" / f"{digest_of([self.selected, self.how, NUMERICS])[:32]}.json"

    def _known_selection(self) -> tuple[Selection, dict[Side, str]] | None:
        if not self.selected:
            return None
        with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError):
            found = read_json(self._index)
            if found["sha256"] == digest_of(found["selection"]):
                kept = dict(found["selection"])
                digests = kept.pop("digests")
                return Selection([], [], **kept), digests
        return None

    def _remember(self, selection: Selection, digests: Mapping[Side, str]) -> None:
        if not self.selected or not isinstance(selection.schema, str):
            return
        kept = {
            "dropped": selection.dropped,
            "identity": selection.identity,
            "counts": selection.counts,
            "schema": selection.schema,
            "notes": selection.notes,
            "heldout_dropped": selection.heldout_dropped,
            "digests": dict(digests),
        }
        with contextlib.suppress(OSError, UserError):
            # Not write_json: it sorts keys, and counts have an order in which they are told.
            write_bytes(self._index, json.dumps({"selection": kept, "sha256": digest_of(kept)}).encode())

    # ------------------------------------------------------------------------------------------------------- tokens

    def path(self, digest: str) -> Path:
        """File of the token ids of rows with this digest."""
        return (
            cache_folder() / "tokens" / f"{digest_of({'rows': digest, 'numerics': NUMERICS, **self.how})[:32]}.jsonl.gz"
        )

    def _read(self, digest: str) -> Tokenised | None:
        """Known token ids; None where there are none, or none that are whole."""
        with contextlib.suppress(OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
            head, _, text = gzip.decompress(self.path(digest).read_bytes()).partition(b"\n")
            about = json.loads(head)
            if about.pop("sha256") == hashlib.sha256(text).hexdigest():
                return Tokenised([json.loads(line) for line in text.splitlines()], **about)
        return None

    def _write(self, digest: str, tokens: Tokenised) -> None:
        about = {name: value for name, value in asdict(tokens).items() if name != "rows"}
        with contextlib.suppress(OSError, UserError):
            write_rows(self.path(digest), [{**about, "sha256": rows_digest(tokens.rows)}, *tokens.rows])


def pinned(identity: Mapping[str, Any]) -> bool:
    """Whether a selection's identity pins its rows: every data set names a revision or the digest of its content."""
    return all(part["dataset"].get("revision") or part["dataset"].get("digest") for part in identity["parts"])
