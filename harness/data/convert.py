"""Rows of one schema as rows of another, by the converters that plugins register."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from harness.contracts.converter import Converter
from harness.contracts.dataset import DatasetRow, schema_name
from harness.contracts.registry import Registered, Registry
from harness.core.errors import UserError
from harness.data.expression import OPTION
from harness.data.row_schema import Schema, settled
from harness.steps.provenance import BUNDLED, code_digest


def converter_of(source: Schema, target: Schema, registry: Registry, where: str = OPTION) -> Registered | None:
    """The one converter between two schemas; None where nothing is to be converted.

    Raises:
        UserError: there is none, or more than one.
    """
    if source == target:
        return None
    known = [(entry, entry.plugin) for entry in registry.entries.values() if isinstance(entry.plugin, Converter)]
    found = [entry for entry, one in known if one.source == source and one.target == target]
    if len(found) == 1:
        return found[0]
    of, to = schema_name(source), schema_name(target)
    if found:
        raise UserError(
            where,
            f"from {of} to {to} there are {len(found)} converters: "
            + " and ".join(f"{entry.name} of {entry.origin.title}" for entry in found),
            "Uninstall one of them, or leave its --plugin out.",
        )
    others = sorted(schema_name(one.target) for _, one in known if one.source == source)
    raise UserError(
        where,
        f"its rows are {of}, and {to} are needed",
        f"From {of} there are: {', '.join(others) or 'no converters'}. Choose another data set or method, or write a "
        "converter: `harness plugins new converter NAME`.",
    )


def convert(
    rows: Iterable[DatasetRow], source: Schema, target: Schema, registry: Registry, where: str = OPTION
) -> Iterator[DatasetRow]:
    """Rows of one schema as rows of another; their order stays.

    Raises:
        UserError: no converter, or several; what one makes is none of the target.
    """
    entry = converter_of(source, target, registry, where)
    if entry is None:
        return iter(rows)
    converter = entry.plugin
    assert isinstance(converter, Converter)
    said = f"{where}, converter {entry.name}"
    return (settled(made, target, said) for row in rows for made in converter.convert(row))


def conversion_codes(target: Schema, registry: Registry) -> dict[Schema, str]:
    """Source schema -> what stands for the code of its conversion in ids; without those that the core once had."""
    return {
        entry.plugin.source: code_digest(entry)
        for entry in registry.entries.values()
        if isinstance(entry.plugin, Converter) and entry.plugin.target == target and not _was_of_the_core(entry)
    }


def _was_of_the_core(entry: Registered) -> bool:
    return type(entry.plugin).__module__.partition(".")[0] == BUNDLED and entry.plugin.numerics == 1
