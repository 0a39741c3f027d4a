"""The folder of an alignment: what lies in it, what of it can be gone on with, what its records hold."""

from __future__ import annotations

import contextlib
import re
import shutil

from harness.core.errors import CorruptionError
from harness.models.artifact import read_artifact
from harness.steps.checksums import PAGES, differences, record_files, told
from harness.steps.files import read_json, stays_inside
from harness.steps.folder import CHECKPOINT_COMPLETE, RECORD, STATUS, STEP, StepFolder
from harness.steps.guard import Guard
from harness.steps.step import Step

ALIGNMENT = Guard(
    "alignment",
    rf"{RECORD}|step-\d+|adapter_model\.safetensors|adapter_config\.json|chat_template\.jinja|lineage\.json|README\.md|"
    r"checksums\.json|model[\w.-]*\.(safetensors|json)|(generation_)?config\.json|tokenizer[\w.]*|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.\w+|merges\.txt|spiece\.model",
    f"{RECORD}/{STEP}",
    listed=f"{RECORD}/export.json",
)


STAGES, TRAINED = "stages", "trained.safetensors"
"""Folder of the records of earlier stages, and the file of weights that each of them has left."""
EXPORTED = "export.json"
"""Names of what the method itself leaves beside the adapter, written before anything of it is."""


def stage_folder(work: StepFolder, stage: str, step_id: str) -> StepFolder:
    """Where the record of an earlier stage lies: ``stages/NAME`` within the folder of the alignment's record.

    That is ``X/step/stages/NAME`` for ``--out X``, and ``steps/align-ARM-ID/stages/NAME`` in a study. It holds what the
    record of an alignment does (step.json, log.jsonl, status.json, held-out rows), and the trained weights, which are
    what the stage has made; the last stage's record is the alignment's own.
    """
    path = work.path / STAGES / stage
    return StepFolder(path, step_id, work.kind, path)


def exported(work: StepFolder) -> list[str]:
    """Names of the files that the method itself has left beside the adapter, or was about to."""
    with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError):
        return [str(name) for name in read_json(work.path / EXPORTED)["files"] if stays_inside(str(name))]
    return []


def record_alignment(work: StepFolder) -> None:
    """Write the record of all files but ``status.json``, which comes after it."""
    root = work.artifact
    own = [path for path in root.iterdir() if re.fullmatch(ALIGNMENT.own, path.name)]
    files = {*own, *(root / name for name in exported(work))}
    for inner in own:
        if inner.is_dir():
            files.update(inner.iterdir() if inner.name == RECORD else inner.rglob("*"))
    if work.path == root / RECORD:
        kept = (path for path in (work.path / STAGES).rglob("*") if not {"checkpoints", "export"} & set(path.parts))
        files.update(kept)
    record_files(root, [file for file in sorted(files) if file != work.path / STATUS])


def tidy(work: StepFolder) -> None:
    """Delete what was only needed to go on."""
    for name in ("checkpoints", "export"):
        shutil.rmtree(work.path / name, ignore_errors=True)


def has_checkpoint(work: StepFolder) -> bool:
    """Whether training can be gone on with: from a checkpoint, or after an earlier stage."""
    checkpoint = f"checkpoints/checkpoint-*/{CHECKPOINT_COMPLETE}"
    found = (checkpoint, f"{STAGES}/*/{checkpoint}", f"{STAGES}/*/{TRAINED}")
    return any(any(work.path.glob(pattern)) for pattern in found)


def intact(step: Step, folder: StepFolder) -> str | None:
    """What is wrong with what an ended alignment left; None where it is whole.

    Args:
        step: what was to be made, and from what.
        folder: of its record, and of the adapter or the model.
    """
    if (problem := folder.problem(step)) is not None:
        return problem
    record = folder.status()
    assert record is not None
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
