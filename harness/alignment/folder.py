"""The folder of an alignment: what lies in it, what of it can be gone on with, what its records hold."""

from __future__ import annotations

import re
import shutil

from harness.models.artifact import read_artifact
from harness.steps.checksums import PAGES, differences, record_files, told
from harness.steps.folder import CHECKPOINT_COMPLETE, RECORD, STATUS, STEP, StepFolder
from harness.steps.guard import Guard
from harness.steps.step import Step, differences_told

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


def has_checkpoint(work: StepFolder) -> bool:
    """Whether training can be gone on with."""
    return any(work.path.glob(f"checkpoints/checkpoint-*/{CHECKPOINT_COMPLETE}"))


def intact(step: Step, folder: StepFolder) -> str | None:
    """What is wrong with what an ended alignment left; None where it is whole.

    Args:
        step: what was to be made, and from what.
        folder: of its record, and of the adapter or the model.
    """
    record = folder.status()
    if record is None or record.status != "done":
        return "it has not ended well"
    if record.id != step.id:
        return f"it is the record of step {record.id[:12]}"
    if record.made_from != step.made_from:
        return f"what it is made from has changed: {differences_told(record.made_from, step.made_from)}"
    found = differences(folder.artifact, everything=True)
    if wrong := {name: how for name, how in found.items() if name not in PAGES}:
        return told(wrong)
    try:
        made = read_artifact(folder.artifact)
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    if (made.kind, made.digest) != (record.artifact, record.digest):
        return f"{made.kind} {made.digest[:12]} is not what is on record, {record.artifact} {str(record.digest)[:12]}"
    return None
