"""A made preference file, alignments in this process, and in processes that can be killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.alignment.processes import TINY_STEPS, Zygote, as_set, write_preferences

if TYPE_CHECKING:
    from harness.alignment.run import Alignment


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 60 preference pairs."""
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """One for all tests: its imports take seconds."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HARNESS_CACHE": str(tmp_path_factory.mktemp("cache")),
        "XDG_CONFIG_HOME": str(tmp_path_factory.mktemp("settings")),
    }
    zygote = Zygote(tmp_path_factory.mktemp("logs"), environment)
    yield zygote
    zygote.close()


@pytest.fixture
def command(tiny: Path, pairs: Path) -> list[str]:
    """``harness align`` of the tiny model on the pairs, six steps, without a method and without --out."""
    return ["align", "--model", str(tiny), "--dataset", f"jsonl:{pairs}", *as_set(**TINY_STEPS)]


@pytest.fixture
def align(alone: Path, tiny: Path, pairs: Path) -> Callable[..., Alignment]:
    """``harness.align`` in this process: ``align(method, folder, learning_rate=1e-3, lora={"rank": 2}, seed=1)``."""
    from harness.alignment import run as alignment
    from harness.contracts.registry import load_plugins
    from harness.core.specs import AlignSpec

    def run(
        method: str,
        out: str | Path,
        *,
        model: Path | str = tiny,
        data: Path = pairs,
        plugins: Sequence[Path] = (),
        **given: Any,
    ) -> Alignment:
        fields = AlignSpec.model_fields.keys() | {"fresh", "reporter", "trackers"}
        settings = {key: given.pop(key) for key in list(given) if key in fields}
        options = {**TINY_STEPS, **given}
        if "lora" in options:
            options["adapter"] = options.pop("lora")
        registry = load_plugins([str(plugin) for plugin in plugins])
        return alignment.align(
            method, str(model), f"jsonl:{data}", out=out, options=options, registry=registry, **settings
        )

    return run
