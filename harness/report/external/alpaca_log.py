"""AlpacaEval's annotations as a run: one model's wins over a reference, in a judge's eyes, paired by instruction."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from harness.core.errors import UserError
from harness.core.records import Output, digest_of
from harness.report.external.annotations import JudgedPair, read_annotations
from harness.report.external.made import Logged, Reported, run_of_log, task_of
from harness.report.read import RunResult, Texts

PROGRAM = "alpaca_eval"


def read_alpaca(path: Path) -> RunResult:
    """Read an annotations file: `win_rate` and `discrete_win_rate`, as shares of 1.

    Raises:
        UserError: the file holds several comparisons or judges, repeats an instruction or lacks one, or holds no
            verdict.
    """
    try:
        found = read_annotations(path)
    except UserError as error:
        if "--" in error.fix:  # options of `harness judge winrate`, which chooses within a file
            raise UserError(
                error.where, error.what, "Give a file of one model against one reference by one judge."
            ) from None
        raise
    rows: dict[str, dict[str, object]] = {}
    pairs: dict[str, JudgedPair] = {}
    for position, pair in enumerate(found.pairs, start=1):
        where = f"{path}, row {position}"
        if pair.instruction is None:
            raise UserError(where, "has no instruction to pair it by", "Give annotations as alpaca_eval writes them.")
        key = digest_of(pair.instruction)[:16]
        if key in rows:
            fix = "Its mean would count one instruction twice: leave one of the rows out."
            raise UserError(where, f"repeats the instruction {pair.instruction[:60]!r}", fix)
        share = None if pair.preference is None else pair.preference - 1
        values = {"win_rate": share, "discrete_win_rate": _discrete(share)}
        rows[key] = {"id": key, "leaf": None, "values": values, "reason": pair.reason}
        pairs[key] = pair
    scored = [pair.preference - 1 for pair in found.pairs if pair.preference is not None]
    if not scored:
        raise UserError(str(path), "holds no verdict", "Give annotations that a judge has answered.")
    discrete = [value for share in scored if (value := _discrete(share)) is not None]
    means = {"win_rate": scored, "discrete_win_rate": discrete}
    model = found.model or path.parent.name or "model"
    log = Logged(
        where=path,
        program=PROGRAM,
        model=model,
        name=f"alpaca_eval@{found.annotator or 'unnamed judge'}",
        reported=[
            Reported(
                metric=name,
                mean=math.fsum(values) / len(values),
                aggregation="mean",
                higher_is_better=True,
                unit="proportion",
                primary=name == "win_rate",
            )
            for name, values in means.items()
        ],
        samples=rows,
        info={
            "variant": "chat",
            "source": f"against {found.reference or 'an unnamed reference'}",
            "asked": {"reference": found.reference, "judge": found.annotator},
            # Another output of the reference under the same name is another opponent.
            "questions": {key: digest_of([pair.instruction, pair.output_1]) for key, pair in pairs.items()},
        },
        scorer={"annotator": found.annotator},
        texts=partial(_texts, pairs),
        notes=found.notes,
    )
    plan = {"source": PROGRAM, "model": {"name": model, "ref": model}, "adapter": None, "engine": {"name": PROGRAM}}
    return run_of_log(path.parent, plan, [task_of(log)])


def _discrete(share: float | None) -> float | None:
    """A win or a loss in whole numbers; a draw counts half."""
    return None if share is None else 0.5 if share == 0.5 else float(share > 0.5)


def _texts(pairs: Mapping[str, JudgedPair], ids: Collection[str]) -> dict[str, Texts]:
    return {
        key: Texts(
            pairs[key].instruction or "",
            pairs[key].output_1,
            ({"kind": "generate"},),
            (Output(text=pairs[key].output_2 or ""),),
        )
        for key in ids
        if key in pairs
    }
