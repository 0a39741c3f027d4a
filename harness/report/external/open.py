"""One door to whatever can be reported on or compared: a run folder of ours, or another program's log."""

from __future__ import annotations

import json
from pathlib import Path

from harness.core.errors import CorruptionError, UserError
from harness.report.external.alpaca_log import read_alpaca
from harness.report.external.inspect_log import is_log, log_files, read_inspect
from harness.report.external.lm_eval_log import read_lm_eval, result_files
from harness.report.read import RunResult, open_run

KINDS = (
    "a folder that `harness eval --out` wrote, a results_*.json of lm-eval or its folder, an .eval or .json log of "
    "inspect, or an annotations.json of AlpacaEval"
)


def open_any(path: Path) -> RunResult:
    """Read a run folder, or a log that another program wrote.

    Raises:
        UserError: it is none of them.
        CorruptionError: a file of it is damaged.
    """
    log = open_log(path)
    return open_run(path) if log is None else log


def open_log(path: Path) -> RunResult | None:
    """Read a log that another program wrote; None for a folder that holds none.

    Raises:
        UserError: a file is no log that is known.
        CorruptionError: it is damaged.
    """
    if path.is_dir():
        return None if (path / "plan.json").is_file() else _open_folder(path)
    return _open_file(path) if path.is_file() else None


def is_foreign(path: Path) -> bool:
    """Whether a path is meant as another program's log: a file, or a folder without a plan of ours that holds one."""
    return path.is_file() or (path.is_dir() and not (path / "plan.json").is_file() and open_log(path) is not None)


def source(run: RunResult) -> str | None:
    """The program that a log is of; None for a run of ours."""
    found = run.plan.get("source")
    return None if found is None else str(found)


def check_sources(a: RunResult, b: RunResult) -> None:
    """Refuse two runs of different programs.

    Raises:
        UserError: they are; prompts, extraction and scores of one task differ between programs.
    """
    names = [source(run) for run in (a, b)]
    if names[0] != names[1]:
        said = " and ".join(name or "harness" for name in names)
        raise UserError(
            f"{a.root} and {b.root}",
            f"were written by {said}, which ask and score a task of one name each in its own way",
            "Compare what one program made: evaluate both models with it.",
        )


def _open_folder(folder: Path) -> RunResult | None:
    if result_files(folder):
        return read_lm_eval(folder)
    if log_files(folder):
        return read_inspect(folder)
    annotations = folder / "annotations.json"
    return read_alpaca(annotations) if annotations.is_file() else None


def _open_file(file: Path) -> RunResult:
    if file.suffix == ".eval" or is_log(file):
        return read_inspect(file)
    if file.name.startswith("samples_"):
        what, fix = "holds samples alone", "Give the results_*.json beside it, or their folder."
        raise UserError(str(file), what, fix)
    if ".jsonl" in file.suffixes or file.suffix == ".gz" or file.read_bytes()[:64].lstrip()[:1] == b"[":
        return read_alpaca(file)
    if file.suffix != ".json":
        raise UserError(str(file), "is no log that is known", f"Give {KINDS}.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptionError(f"{file}: damaged ({error})\n  Evaluate again.") from None
    if isinstance(found, dict) and "results" in found:
        return read_lm_eval(file)
    keys = ", ".join(sorted(map(str, found))[:6]) if isinstance(found, dict) else type(found).__name__
    raise UserError(str(file), f"is no log that is known (keys: {keys})", f"Give {KINDS}.")
