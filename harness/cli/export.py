"""`harness export`: a run in another program's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option(help="Folder that gets one folder for each arm.")],
    samples: Annotated[
        bool, typer.Option("--samples", help="Also prompts and answers, red-team text among them.")
    ] = False,
) -> None:
    """Write a run as lm-eval's results_*.json and samples_*.jsonl, for the tools that read those."""
    from harness.core.text import visible
    from harness.report.external.lm_eval_writer import write_lm_eval

    for file in write_lm_eval(run, out, samples=samples):
        typer.echo(visible(str(file)))
