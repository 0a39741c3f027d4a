"""The contract of converters: rows of one schema as rows of another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from pydantic import BaseModel

from harness.contracts.dataset import DatasetRow, RowSchema
from harness.contracts.plugin import C, Plugin


class Converter(Plugin[C]):
    """Lets data sets of one schema feed aligners that consume another; found by its two schemas, not by its name."""

    kind = "converter"
    source: ClassVar[RowSchema | type[BaseModel]]
    """Schema of the data set: a name, or a class of rows."""
    target: ClassVar[RowSchema | type[BaseModel]]
    """What the aligner consumes: a name, or a class of rows."""

    @abstractmethod
    def convert(self, row: DatasetRow) -> Iterable[DatasetRow]:
        """Rows of the target made from one row of the source, in a fixed order.

        Args:
            row: as the data set gives it, except that a prompt is a list of messages.

        Returns:
            One row, which keeps the id; several, each with the id and a suffix of its own (``f"{row.id}/chosen"``); or
            none, where the row cannot be used.
        """
