"""harness: a plugin-based, evaluation-first harness for preference alignment of language models.

Every public name can be imported from here; each is loaded when it is first used: ``import harness`` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "alignment": ("Alignment", "align"),
    "attaching": ("attach_adapter",),
    "config": ("Config",),
    "contracts": [
        "CONTRACT_VERSION",
        "Adapter",
        "Aligner",
        "Availability",
        "Capabilities",
        "Dataset",
        "DatasetJob",
        "DatasetRow",
        "Engine",
        "Executor",
        "Factors",
        "Merged",
        "Merger",
        "PairLogps",
        "Plugin",
        "Scorer",
        "ScorerContext",
        "Session",
        "Stage",
        "TrainingJob",
    ],
    "data": ("load_hub_dataset", "resolve_revision"),
    "errors": ("HarnessError", "StepError", "UserError"),
    "execute": ("Evaluation", "evaluate"),
    "generation_config": ("end_tokens", "generation_identity"),
    "hookspecs": ("hookimpl",),
    "machine": ("torch_device",),
    "merging": ("Merging", "merge"),
    "models": ("adapter_modules", "inspect_model", "with_tokenizer"),
    "packing": ("PackingCollator",),
    "pairwise": ("PairwiseLoss", "PairwiseRecipe"),
    "precision": ("settle_dtype",),
    "recipes": ("Recipe",),
    "provenance": ("NUMERICS", "file_digest", "files_digest"),
    "records": [
        "AdapterInfo",
        "Answer",
        "Metric",
        "ModelInfo",
        "Output",
        "Request",
        "Row",
        "Sample",
        "Score",
        "StepRecord",
    ],
    "registry": ("Registry", "load_plugins"),
    "stats": ("cohen_kappa",),
    "store": ("Journal",),
    "specs": [
        "DatasetRef",
        "Decoding",
        "EvalSpec",
        "LmEvalRef",
        "MergeInput",
        "MergeSpec",
        "ModelSpec",
        "ScorerRef",
        "SuiteSpec",
        "TaskSpec",
    ],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    value = getattr(import_module(f"harness.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from harness.contracts.engine import Engine as Engine
    from harness.contracts.plugin import CONTRACT_VERSION as CONTRACT_VERSION
    from harness.contracts.scorer import Scorer as Scorer
    from harness.core.config import Config as Config
    from harness.core.machine import torch_device as torch_device
    from harness.models.generation_config import end_tokens as end_tokens
    from harness.models.generation_config import generation_identity as generation_identity
    from harness.models.precision import settle_dtype as settle_dtype
