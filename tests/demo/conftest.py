"""A small world that the tests of the demo share."""

from __future__ import annotations

import pytest

from harness.demo.world import World, build_world

STEPS = 300
"""Optimiser steps of its base: enough to know most of what it is asked."""


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a base of fewer steps, in its own folder."""
    return build_world(tmp_path_factory.mktemp("demo") / "world", steps=STEPS)
