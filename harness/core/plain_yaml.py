"""The one reader of YAML: plain data of a bounded size, whoever wrote it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 100_000
"""Values of a document, an alias counted with all that it stands for: nine lines of aliases make a billion."""
MOST_DEPTH = 100
"""Levels of mappings and lists within each other."""
_STRANGE = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "binary", "set", "omap", "pairs")}


class NotPlain(yaml.MarkedYAMLError):
    """YAML that says more than plain data: too much of it, itself within itself, or a value that is none."""

    def __init__(self, problem: str, node: yaml.Node | None = None) -> None:
        super().__init__(problem=problem, problem_mark=None if node is None else node.start_mark)


class PlainLoader(yaml.SafeLoader):
    """Mappings with texts as keys, lists, texts, numbers, true, false and null; a date is a text."""

    text_keys = True
    yaml_constructors = {tag: how for tag, how in yaml.SafeLoader.yaml_constructors.items() if tag not in _STRANGE}  # noqa: RUF012
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag not in _STRANGE]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As PyYAML, whose constructors raise whatever Python raises for a text that is no number, say."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, OverflowError):
            raise NotPlain(f"{node.value!r} is no {node.tag.rpartition(':')[2]}", node) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As PyYAML, where a key may be anything."""
        found = super().construct_mapping(node, deep)
        strange = next((key for key in found if not isinstance(key, str)), None) if self.text_keys else None
        if strange is not None or (self.text_keys and None in found):
            raise NotPlain(f"key {strange!r} is no text: quote it", node)
        return found


def read_yaml(text: str, loader: type[PlainLoader] = PlainLoader) -> Any:
    """The data of one document.

    Raises:
        yaml.YAMLError: no YAML; ``NotPlain`` for what is more than bounded plain data.
    """
    return document_of(text, loader)[1]


def document_of(text: str, loader: type[PlainLoader] = PlainLoader) -> tuple[yaml.Node | None, Any]:
    """The nodes of one document, so many that all that is done with them ends soon, and its data.

    Raises:
        yaml.YAMLError: as :func:`read_yaml`.
    """
    if len(text) > MOST_CHARACTERS:
        raise NotPlain(f"{len(text):,} characters, and no more than {MOST_CHARACTERS:,} are read")
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None, None
        check_size(node)
        return node, reader.construct_document(node)
    except RecursionError:
        raise NotPlain(f"more than {MOST_DEPTH} levels within each other") from None
    finally:
        reader.dispose()


def check_size(node: yaml.Node) -> None:
    """Refuse a document whose aliases multiply, or which stands in itself.

    Raises:
        NotPlain: at the node where it shows.
    """
    _measure(node, {})


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values and levels a node stands for, aliases resolved.

    Raises:
        NotPlain: too many, or a node within itself.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise NotPlain("an alias refers to what it stands in", node)
        return found
    if isinstance(node, yaml.ScalarNode):
        _check_text(node)
        return 1, 0
    known[id(node)] = None
    inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    values, levels = 1, 0
    for one in inner:
        more, below = _measure(one, known)
        values, levels = values + more, max(levels, below)
    if values > MOST_VALUES:
        raise NotPlain(f"more than {MOST_VALUES:,} values, aliases resolved", node)
    if levels >= MOST_DEPTH:
        raise NotPlain(f"more than {MOST_DEPTH} levels within each other", node)
    known[id(node)] = values, levels + 1
    return values, levels + 1


def _check_text(node: yaml.ScalarNode) -> None:
    """No file, request or terminal takes these two; YAML can write them as escapes."""
    if "\0" in node.value or any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise NotPlain("a text with a NUL or half a surrogate pair", node)
