"""What commands print: tables, JSON, and lines on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.text import visible

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str) -> None:
    """Print to stderr, with what a terminal would act upon made visible."""
    print(visible(text, lines=True), file=sys.stderr, flush=True)


def print_json(value: Any, *, line: bool = False) -> None:
    """Print JSON, in one line if asked."""
    import json

    print(json.dumps(value, indent=None if line else 2, ensure_ascii=False, allow_nan=False), flush=line)


def wide_console() -> Console:
    """A console as wide as the terminal; in a pipe, where there is no width to fit into, of 200 columns."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> None:
    """Print one row for each mapping; what it lacks stays empty."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=header)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row.get(column) is None else visible(str(row[column]))) for column in columns))
    wide_console().print(table)
