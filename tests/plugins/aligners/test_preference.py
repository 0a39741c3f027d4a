"""The bundled aligners pass the kit that everybody's must pass."""

from __future__ import annotations

import pytest

from harness import Aligner, load_plugins
from harness.testing import check_aligner
from harness_plugins.aligners.preference import Cdpo, Dpo, Ipo, Orpo
from harness_plugins.aligners.sft import Sft

ALL = (Sft, Dpo, Cdpo, Ipo, Orpo)


@pytest.mark.parametrize("plugin", ALL, ids=lambda plugin: plugin.name)
def test_contract(plugin: type[Aligner]) -> None:
    check_aligner(plugin(), steps=2)


def test_they_are_registered() -> None:
    registry = load_plugins()
    for plugin in ALL:
        assert type(registry.find(Aligner, plugin.name, "test")) is plugin


def test_which_need_a_reference() -> None:
    assert {plugin.name for plugin in ALL if plugin.needs_reference} == {"dpo", "cdpo", "ipo"}
