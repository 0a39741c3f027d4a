"""The folder of an alignment: what lies in it, what of it can be gone on with, what its records hold."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from harness.steps.checksums import record_files
from harness.steps.folder import CHECKPOINT_COMPLETE, RECORD, STATUS, STEP, StepFolder
from harness.steps.guard import Guard

ALIGNMENT = Guard(
    "alignment",
    rf"{RECORD}|step-\d+|adapter_model\.safetensors|adapter_config\.json|chat_template\.jinja|lineage\.json|README\.md|"
    r"checksums\.json|model[\w.-]*\.(safetensors|json)|(generation_)?config\.json|tokenizer[\w.]*|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.\w+|merges\.txt|spiece\.model",
    f"{RECORD}/{STEP}",
)


def record_alignment(folder: StepFolder) -> None:
    """Write the record of all files but ``status.json``, which comes after it."""
    root = folder.artifact
    own = [path for path in root.iterdir() if re.fullmatch(ALIGNMENT.own, path.name)]
    files = [*own, *(file for inner in own if inner.is_dir() for file in inner.iterdir())]
    record_files(root, [file for file in files if file != folder.path / STATUS])


def tidy(folder: StepFolder) -> None:
    """Delete what was only needed to go on."""
    for name in ("checkpoints", "export"):
        shutil.rmtree(folder.path / name, ignore_errors=True)


def has_checkpoint(out: Path) -> bool:
    """Whether training can be gone on with."""
    return any(out.glob(f"{RECORD}/checkpoints/checkpoint-*/{CHECKPOINT_COMPLETE}"))
