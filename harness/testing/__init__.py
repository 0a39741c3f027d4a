"""Contract kits for plugin authors, one for each kind, and a tiny model to run them on.

A kit takes the plugin (an instance) and raises :class:`AssertionError` with what the contract says and what was seen::

    from harness.testing import check_scorer
    from harness_brevity import Brevity

    def test_contract():
        check_scorer(Brevity())

Nothing heavy is imported before a kit needs it.
"""

from __future__ import annotations

from harness.testing.common import check_plugin, registry_of
from harness.testing.data import check_converter, check_dataset, check_tasks
from harness.testing.engine import check_engine
from harness.testing.executor import check_executor
from harness.testing.merging import check_merger
from harness.testing.scorer import check_scorer, example_answers
from harness.testing.section import check_section, example_board
from harness.testing.tiny import tiny_adapter, tiny_conditioning, tiny_model
from harness.testing.training import check_adapter, check_aligner

__all__ = [
    "check_adapter",
    "check_aligner",
    "check_converter",
    "check_dataset",
    "check_engine",
    "check_executor",
    "check_merger",
    "check_plugin",
    "check_scorer",
    "check_section",
    "check_tasks",
    "example_answers",
    "example_board",
    "registry_of",
    "tiny_adapter",
    "tiny_conditioning",
    "tiny_model",
]
