"""`harness merge` and `harness fold` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from harness.cli.options import (
    AllowPickle,
    AllowTemplateMismatch,
    PluginFiles,
    TrustRemoteCode,
    model_of,
    options_of,
    with_defaults,
)
from harness.cli.tables import print_table
from harness.core.errors import ExitCode, UserError
from harness.core.text import visible


class MergeCommand(typer.core.TyperCommand):
    """Lets ``--inputs`` stand before any number of models."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write every model out with an ``--inputs`` of its own."""
        plain: list[str] = []
        listing = False
        for argument in args:
            if argument == "--inputs":
                listing = True
            elif argument.startswith("-"):
                listing = False
                plain.append(argument)
            elif listing:
                plain += ["--inputs", argument]
            else:
                plain.append(argument)
        return super().parse_args(ctx, plain)


def merge(
    method: Annotated[
        str | None, typer.Argument(help="slerp, linear, task_arithmetic, ties, dare_ties, ..., or a plugin's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that differences are taken from: folder or hub id.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--inputs", metavar="ARM[@CONTROL][:WEIGHT]...", help="Adapters and checkpoints, in order."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="mergekit's YAML instead of all of these.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="density=0.5, t=0.3: an option of the method.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random masks.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="auto (the base's), float32, bfloat16, float16.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads; by default as many as cores, up to 8.")] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes of one file of weights: 5GB, 500MB.")] = "5GB",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder of the result; done at once if it holds this merge.")] = None,
    form: Annotated[str, typer.Option("--as", help="model, or adapter (low rank, on the base).")] = "model",
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter; the sum of the inputs' when absent.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace another merge that the folder holds.")] = False,
    plugin: PluginFiles = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Copy the model's own code.")] = False,
    allow_template_mismatch: Annotated[
        bool, typer.Option("--allow-template-mismatch", help="Go on when models differ in chat template.")
    ] = False,
) -> int:
    """Merge adapters and checkpoints into one model, or one adapter."""
    from harness.core.progress import for_terminal
    from harness.merging.record import fallback_note
    from harness.merging.run import merge as run

    if out is None:
        raise UserError("--out", "where the result goes is not said", "Add --out FOLDER.")
    trust = {
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
        "allow_template_mismatch": allow_template_mismatch,
    }
    given = {"method": method, "base": base, "inputs": inputs, "--set": set_}
    spec = _from_config(config, given, seed, trust) if config is not None else _from_options(given, trust, seed)
    spec = _changed(spec, {"dtype": dtype, "form": form, "rank": rank})
    _, registry = with_defaults(plugin)
    with for_terminal() as reporter:
        made = run(
            spec,
            out=out,
            fresh=fresh,
            registry=registry,
            reporter=reporter,
            workers=workers,
            shard_size=parse_size(shard_size),
            device=device,
        )
        for note in [*made.record["notes"], fallback_note(made.record)]:
            if note is not None:
                reporter.note(f"note: {note}")
    _print_totals(made.record)
    print(visible(str(made.folder)))
    return ExitCode.DONE


def _from_config(config: Path, given: dict[str, Any], seed: int, trust: dict[str, bool]) -> Any:
    from harness.merging.mergekit.config import read_merge_config

    also = [f"--{key}" if not key.startswith("-") else key for key, value in given.items() if value]
    if also:
        what = f"{config} says everything, and {', '.join(also).replace('--method', 'METHOD')} is given too"
        raise UserError("--config", what, "Give one or the other.")
    spec = read_merge_config(config, seed=seed)
    if spec.base is None:
        return spec
    return spec.model_copy(update={"base": spec.base.model_copy(update=trust)})


def _from_options(given: dict[str, Any], trust: dict[str, bool], seed: int) -> Any:
    from harness.core.config import parse_options
    from harness.core.specs import MergeSpec
    from harness.merging.plan import parse_input

    if not given["method"]:
        raise UserError(
            "METHOD", "how to merge is not said", "Give a method (`harness plugins` lists mergers) or --config."
        )
    if not given["inputs"]:
        raise UserError("--inputs", "there is nothing to merge", "Add --inputs ARM[:WEIGHT] ARM[:WEIGHT] ...")
    fields = {
        "method": given["method"],
        "inputs": [parse_input(one).model_dump() for one in given["inputs"]],
        "base": {"model": given["base"], **trust} if given["base"] is not None else None,
        "options": options_of(given["--set"]),
        "seed": seed,
    }
    return parse_options(MergeSpec, fields, "harness merge")


def _changed(spec: Any, given: dict[str, Any]) -> Any:
    """The spec with what the command line says of the result, checked like the rest."""
    from harness.core.config import parse_options
    from harness.core.specs import MergeSpec

    fields = {**spec.model_dump(), **{key: value for key, value in given.items() if value is not None}}
    return parse_options(MergeSpec, fields, "harness merge")


def parse_size(text: str, where: str = "--shard-size") -> int:
    """The bytes that ``5GB``, ``500MB``, ``64KB`` or a plain number stands for.

    Raises:
        UserError: anything else.
    """
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
    plain = text.strip().upper()
    unit = next((name for name in units if plain.endswith(name)), "")
    try:
        size = int(float(plain.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(where, f"{text!r} is no size", "Write for example 5GB or 500MB.")
    return size


def _print_totals(record: dict[str, Any]) -> None:
    from harness.merging.record import totals

    rows = [{"name": name, "value": value} for name, value in totals(record)]
    print_table(f"{record['method']}, {record['form']}", ["name", "value"], rows, header=False)


def fold(
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a peft adapter.")],
    base: Annotated[str, typer.Option(help="The model it was trained on: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the model; done at once if it holds this fold.")],
    precision: Annotated[
        str, typer.Option(help="bf16: the base as stored; nf4-roundtrip: the base as QLoRA training saw it.")
    ] = "bf16",
    dtype: Annotated[str, typer.Option(help="auto (the base's), float32, bfloat16, float16.")] = "auto",
    control: Annotated[str | None, typer.Option(help="Value of its conditioning; the default when absent.")] = None,
    probe: Annotated[Path | None, typer.Option(help="JSON lines with texts to compare on; else bundled ones.")] = None,
    probe_prompts: Annotated[int | None, typer.Option(help="How many of them; 0: no comparison.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace another merge that the folder holds.")] = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_template_mismatch: AllowTemplateMismatch = False,
    plugin: PluginFiles = None,
) -> int:
    """Fold an adapter into its base, in the base's precision or in the one that QLoRA trained on."""
    from harness.core.progress import for_terminal
    from harness.merging.fold.run import fold as run, probe_line

    given = model_of(
        "harness fold",
        model=base,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        allow_template_mismatch=allow_template_mismatch,
    )
    with for_terminal() as reporter:
        made = run(
            adapter,
            given,
            out=out,
            fresh=fresh,
            registry=with_defaults(plugin)[1],
            reporter=reporter,
            precision=precision,
            dtype=dtype,
            control=control,
            probe=probe,
            probe_prompts=probe_prompts,
        )
        for note in made.record["notes"]:
            reporter.note(f"note: {note}")
    for one in made.record["probe"].get("comparisons", []):
        print(visible(probe_line(one).removeprefix("* ")))
    print(visible(str(made.folder)))
    return ExitCode.DONE
