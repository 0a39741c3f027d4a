"""Preference pairs as what other methods train on: the chosen answers, or both answers with a rating."""

from __future__ import annotations

from collections.abc import Iterator

from harness import Converter, DatasetRow


class PairsToDemonstrations(Converter):
    """The chosen answer of each pair."""

    name = "pairs-to-demonstrations"
    summary = "the chosen answer of each pair"
    source = "pairs"
    target = "demonstrations"

    def convert(self, row: DatasetRow) -> Iterator[DatasetRow]:
        """One row with the id of the pair."""
        yield DatasetRow(row.id, {"prompt": row.data["prompt"], "completion": row.data["chosen"]})


class PairsToRated(Converter):
    """Both answers of each pair, rated 1 and 0 for a preference without a name."""

    name = "pairs-to-rated"
    summary = "both answers of each pair, the chosen rated 1 and the rejected 0"
    source = "pairs"
    target = "rated"

    def convert(self, row: DatasetRow) -> Iterator[DatasetRow]:
        """Two rows, whose ids are the pair's with the answer's name."""
        for which, rating in (("chosen", 1.0), ("rejected", 0.0)):
            data = {"prompt": row.data["prompt"], "completion": row.data[which], "ratings": {"preference": rating}}
            yield DatasetRow(f"{row.id}/{which}", data)
