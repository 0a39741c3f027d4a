"""`harness push` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import Json
from harness.cli.tables import print_json, print_table, say
from harness.core.errors import UserError


def push(
    what: Annotated[Path, typer.Argument(help="A folder of `align`, `merge` or `fold`; or a run folder.")],
    to: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Where on the hub.")],
    arm: Annotated[str | None, typer.Option(help="Of a study: the arm to send. Without it: the run's report.")] = None,
    results: Annotated[Path | None, typer.Option(help="A run that evaluated it; of --arm the run itself.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base, where it was a folder.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence that it is published under: apache-2.0, ...")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send it. Without this nothing leaves the machine.")] = False,
    json_: Json = False,
) -> None:
    """Publish an adapter or a model with its card, or a run's report as a static Space: a dry run unless --yes."""
    from harness.publishing.push import arm_folder, pack_arm, pack_report, send

    is_run = (what / "plan.json").is_file()
    if arm is not None and not is_run:
        raise UserError(f"--arm {arm}", f"{what} is no run folder", "Give a study's run folder, or leave --arm out.")
    if is_run and arm is None:
        given = {"--results": results, "--base-model": base_model, "--licence": licence}
        if (option := next((name for name, value in given.items() if value is not None), None)) is not None:
            raise UserError(option, "is of an arm, and this is a whole run's report", "Give --arm, or leave it out.")
        parcel = pack_report(what, to.rpartition("/")[2])
    else:
        folder = arm_folder(what, arm) if arm is not None else what
        measured = results or (what if arm is not None else None)
        parcel = pack_arm(folder, results=measured, base_model=base_model, licence=licence)
    sizes = dict(parcel.sizes())
    if json_:
        print_json({"kind": parcel.kind, "to": to, "files": sizes, "card": parcel.card, "sent": yes})
    else:
        rows = [{"file": name, "bytes": f"{size:,}"} for name, size in sizes.items()]
        print_table(f"{parcel.kind} {to}", ("file", "bytes"), rows)
        print(parcel.card)
    if yes:
        say(f"sent: {send(parcel, to, private=private)}")
    else:
        say("a dry run: nothing was sent. --yes sends it.")
