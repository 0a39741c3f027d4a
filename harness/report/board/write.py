"""Writes a board: its pages, `board.json`, `.md`, `.csv` and `tables/*.tex`, rebuilt from records byte for byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from harness.contracts.report_section import ReportSection
from harness.core.errors import CorruptionError, UserError
from harness.report.board.build import board_of, check_board
from harness.report.board.gather import gather
from harness.report.board.model import Board
from harness.report.board.paper import LAYOUTS, paper_tables
from harness.report.board.published import match_published, published_files
from harness.report.board.text import board_csv, board_latex, board_markdown
from harness.report.figures.png import png_drawer
from harness.report.pages.write import write_pages
from harness.steps.files import read_json, write_bytes

FILES = ("board.json", "board.md", "board.csv", "tables/board.tex")


def write_board(
    roots: Sequence[Path],
    out: Path,
    *,
    title: str | None = None,
    layout: str | None = None,
    published: Path | None = None,
    alpha: float = 0.05,
    samples: bool | None = None,
    sections: Sequence[ReportSection] = (),
    png: bool = False,
) -> Board:
    """Build the board of some runs and studies, and write it and its pages into ``out``.

    Args:
        roots: run folders.
        out: folder of the files.
        title: in place of the names of the runs.
        layout: ``paper``: also the tables of arXiv 2406.04879.
        published: YAML of published numbers, or the name of a shipped one; beside ours in `tables/published.md` and
            in that layout.
        alpha: level of the tests, after Holm's correction.
        samples: write all samples beside the page, or none; None: where they are not too many.
        sections: what plugins add to the page.
        png: write figures as PNG beside their SVG.

    Raises:
        UserError: a folder is no run, or the layout is unknown, or PNG cannot be drawn here.
        CorruptionError: a record is damaged.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError("--layout", f"{layout!r} is none", f"Layouts: {', '.join(LAYOUTS)}.")
    if png:
        png_drawer()
    check_board(roots, alpha)
    found = gather(roots)
    board = board_of(found, title=title, alpha=alpha)
    # ASCII, so that printing the file cannot steer a terminal.
    text = json.dumps(board.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False)
    files = {
        "board.json": text + "\n",
        "board.md": board_markdown(board),
        "board.csv": board_csv(board),
        "tables/board.tex": board_latex(board),
    }
    matched = match_published(published, board) if published is not None else None
    if layout is not None:
        files |= paper_tables(board, matched)
    if matched is not None:
        files |= published_files(board, matched)
    for name, content in files.items():
        write_bytes(out / name, content.encode())
    write_pages(board, found, out, samples=samples, sections=sections, png=png)
    return board


def load_board(out: Path) -> Board:
    """Read board.json as it lies there.

    Raises:
        CorruptionError: the file is torn, or no board.
    """
    try:
        return Board.model_validate(read_json(out / "board.json"))
    except ValueError as error:
        raise CorruptionError(f"{out / 'board.json'}: no board ({error}); run `harness report` again") from None
