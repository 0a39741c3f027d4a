"""`harness data`: the data sets there are, and what training sees of them."""

from __future__ import annotations

from typing import Annotated

import typer

from harness.cli.options import DataRevisions, Json, PluginFiles, options_of, revisions_of, with_defaults
from harness.cli.tables import print_json, print_table, wide_console

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List data sets, or see what training sees.")


@data_app.command("list")
def data_list(plugin: PluginFiles = None, as_json: Json = False) -> None:
    """List data sets with subsets, row schema, licence, source and revision."""
    from harness.data.preview import dataset_list

    _, registry = with_defaults(plugin)
    listed = dataset_list(registry)
    if as_json:
        print_json(listed)
        return
    rows = [{**row, "subsets": ", ".join(row["subsets"])} for row in listed]
    print_table("Data sets", ["name", "subsets", "schema", "licence", "source", "revision", "summary"], rows)


@data_app.command("show")
def data_show(
    dataset: Annotated[str, typer.Argument(help="NAME[@REVISION][:SUBSET][*WEIGHT] + ..., jsonl:FILE or OWNER/NAME.")],
    model: Annotated[str, typer.Option(help="Model folder or hub id: whose tokenizer and chat template.")],
    mask: Annotated[bool, typer.Option("--mask", help="Colour tokens by whether they carry loss.")] = False,
    samples: Annotated[int, typer.Option(help="Rows to show.")] = 3,
    template: Annotated[str | None, typer.Option(help="vicuna, mistral or a .jinja file; else the model's.")] = None,
    schema: Annotated[str | None, typer.Option(help="pairs, demonstrations or rated; else the data set's own.")] = None,
    loss_on: Annotated[str, typer.Option(help="last, all_answers or everything (demonstrations).")] = "last",
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and answer together.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME.KEY=V: an option of a data set.")] = None,
    data_revision: DataRevisions = None,
    plugin: PluginFiles = None,
) -> None:
    """Show rows as training sees them: text, token ids, loss mask; and what was left out and why."""
    from rich.text import Text

    from harness.data import preview as show
    from harness.data.expression import at_revisions

    options = {"schema": schema, "loss_on": loss_on, "data": options_of(set_)}
    defaults, registry = with_defaults(plugin)
    shown = show.look(
        at_revisions(dataset, registry, revisions_of(data_revision, defaults)),
        model,
        registry=registry,
        template=template,
        rows=samples,
        seed=seed,
        max_length=max_length,
        options=options,
    )
    console = wide_console()
    for part in [*show.samples(shown, samples, mask=mask), *show.summary(shown)]:
        console.print(part, highlight=False, soft_wrap=isinstance(part, Text))
