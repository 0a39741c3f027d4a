"""`harness align` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from harness.cli.options import (
    AllowPickle,
    DataRevisions,
    PluginFiles,
    Revision,
    TrustRemoteCode,
    model_of,
    options_of,
    revisions_of,
    with_defaults,
)
from harness.core.errors import ExitCode, UserError
from harness.core.text import first_line, visible

OWN_GRID = "its own grid"
"""What a bare ``--search`` stands for."""


class AlignCommand(typer.core.TyperCommand):
    """Lets ``--search`` stand alone, or before any number of KEY=v1,v2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write every ``--search`` out as an option with one value."""
        plain: list[str] = []
        searching = False
        for position, argument in enumerate(args):
            following = args[position + 1] if position + 1 < len(args) else ""
            if argument == "--search":
                searching = True
                if not _is_values(following):
                    plain += [argument, OWN_GRID]
            elif searching and _is_values(argument):
                plain += ["--search", argument]
            else:
                searching = False
                plain.append(argument)
        return super().parse_args(ctx, plain)


def _is_values(text: str) -> bool:
    return "=" in text and not text.startswith("-")


def align(
    method: Annotated[str, typer.Argument(help="sft, dpo, ipo, cdpo, orpo, or an aligner of a plugin.")],
    model: Annotated[str, typer.Option(help="Base model: folder or hub id.")],
    dataset: Annotated[str, typer.Option(help="For example hh-rlhf:harmless, A*0.3+B*0.7, 'A&B', jsonl:FILE.")],
    adapter: Annotated[str, typer.Option(help="lora, qlora, or none (full fine-tuning).")] = "lora",
    start: Annotated[str | None, typer.Option("--from", help="Adapter to continue from; stays frozen.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template: vicuna, mistral or a .jinja file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; the method's own number when absent.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Rows to train on, counted after all drops: a prefix of one order.")
    ] = None,
    checkpoints: Annotated[str | None, typer.Option(help="Steps whose adapters are kept, e.g. 50,100,200.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, batch order and dropout.")] = 0,
    data_seed: Annotated[int, typer.Option(help="Seed of the order that --samples takes a prefix of.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="beta=0.2, adapter.rank=8, dataset.NAME.KEY=V.")
    ] = None,
    data_revision: DataRevisions = None,
    processes: Annotated[int, typer.Option(help="Processes, each with a device of its own, that share a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto (bf16 on CUDA, fp32 on CPU), float32, bfloat16.")] = "auto",
    revision: Revision = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the adapter; goes on if it holds this alignment.")] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            metavar="[KEY=v1,v2,...]...",
            help="One alignment per cell of a grid (the method's own, over rank and alpha); best by held-out rows.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --search: try again the cells that failed.")
    ] = False,
    tracker: Annotated[
        list[str] | None,
        typer.Option(help="Told of the curves, live: tensorboard, wandb, mlflow, trackio (repeatable); all stay here."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the folder holds and start over.")] = False,
    plugin: PluginFiles = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> int:
    """Train one arm: a base, a method, a data set, an adapter."""
    from harness.alignment.run import align as run
    from harness.core.progress import for_terminal

    options = options_of(set_)
    if steps is not None:
        options["steps"] = steps
    defaults, registry = with_defaults(plugin)
    base = model_of(
        "harness align",
        model=model,
        revision=revision,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    common: dict[str, Any] = {
        "fresh": fresh,
        "registry": registry,
        "adapter": adapter,
        "start": start,
        "template": template,
        "samples": samples,
        "checkpoints": _steps(checkpoints),
        "seed": seed,
        "data_seed": data_seed,
        "processes": processes,
        "options": options,
        "data_revisions": revisions_of(data_revision, defaults),
    }
    with for_terminal() as reporter:
        if search is not None:
            if tracker:
                raise UserError("--tracker", "follows one training, and --search makes many", "Leave one of them out.")
            asked = {**common, "retry_failed": retry_failed, "reporter": reporter}
            return _search(search, (method, base, dataset), out, asked)
        made = run(method, base, dataset, out=out, reporter=reporter, trackers=tracker or (), **common)
    print(visible(str(made.folder)))
    return ExitCode.DONE


def _search(texts: list[str], what: tuple[str, Any, str], out: Path | None, common: dict[str, Any]) -> int:
    from harness.steps.execute import Execution
    from harness.study.cells import OPTION
    from harness.study.search import parse_grid, search
    from harness.study.searched import TABLE
    from harness.study.workers import through

    if out is None:
        raise UserError(OPTION, "where the cells go is not said", "Add --out FOLDER.")
    grid = parse_grid([text for text in texts if text != OWN_GRID])
    if (given := common["options"].pop("executor", None)) is not None:
        common["execute"] = through(Execution("local", given), common["registry"])
    found = search(*what, out=out, grid=grid, **common)
    for name, reason in found.study.failures.items():
        common["reporter"].note(f"failed: {name}: {first_line(reason)}")
    if found.best is not None:
        print(visible((out / TABLE).read_text(encoding="utf-8"), lines=True))
        print(visible(str(found.best)))
    return ExitCode.STEPS_FAILED if found.study.failures else ExitCode.DONE


def _steps(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in (text or "").split(",") if part.strip()}))
    except ValueError:
        raise UserError("--checkpoints", f"{text!r} is no list of steps", "Write for example 50,100,200.") from None
