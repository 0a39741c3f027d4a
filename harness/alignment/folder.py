"""The folder of an alignment: whose it is, what may be deleted, what is still needed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord
from harness.steps.checksums import CHECKSUMS, differences, record_files, still_whole
from harness.steps.files import read_json
from harness.steps.folder import CHECKPOINT_COMPLETE, StepFolder
from harness.steps.provenance import files_digest

WORK = "training"
"""Folder beside the adapter for everything that is not the adapter."""

_OWN = re.compile(
    r"training|step-\d+|adapter_model\.safetensors|adapter_config\.json|chat_template\.jinja|lineage\.json|README\.md|"
    r"checksums\.json|model[\w.-]*\.(safetensors|json)|(generation_)?config\.json|tokenizer[\w.]*|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.\w+|merges\.txt|spiece\.model|\..*"
)
"""Names that an alignment leaves in its folder."""


def claim(root: Path, step_id: str, identity: Mapping[str, Any]) -> None:
    """The folder is empty, holds this very alignment, or one that came to nothing.

    Raises:
        UserError: it holds something else; says what differs.
    """
    file = root / WORK / "step.json"
    if file.exists():
        before = read_json(file)
        if before.get("id") == step_id:
            return
        if not holds_training(root):
            clear(root)
            return
        changed = _different(before.get("identity", {}), json.loads(json.dumps(identity)))
        raise UserError(
            f"--out {root}",
            f"holds another alignment; different: {', '.join(changed)}",
            "Give another --out, or --fresh.",
        )
    refuse_strangers(root, fresh=False)


def refuse_strangers(root: Path, *, fresh: bool) -> None:
    """Writes nothing, so it can be asked before the folder is locked.

    Raises:
        UserError: the folder holds what is no alignment's: without its record anything, else files of unknown names.
    """
    if not root.is_dir() or (not fresh and (root / WORK / "step.json").exists()):
        return
    if strange := _strange(root):
        raise UserError(
            f"--out {root}",
            f"holds files that are no alignment's ({', '.join(strange[:5])})",
            "Give a new folder."
            if not fresh
            else "--fresh deletes only an alignment. Give another folder, or move those files.",
        )


def clear(root: Path) -> None:
    """Delete an alignment (``--fresh``).

    Raises:
        UserError: the folder holds anything else; nothing has been deleted.
    """
    refuse_strangers(root, fresh=True)
    # The record goes last, so that a clearing that is cut short can be taken up again.
    for child in sorted(root.iterdir(), key=lambda path: path.name == WORK):
        if child.name != ".lock":
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def weights_digest(out: Path) -> str:
    """Digest of what was trained: in ``status.json`` when the alignment ends."""
    return files_digest(out.glob("*.safetensors"), out)


def record_alignment(root: Path) -> None:
    """Write the record of all files but ``status.json``, which comes after it."""
    own = [path for path in root.iterdir() if _OWN.fullmatch(path.name) and not path.name.startswith(".")]
    files = [*own, *(file for folder in own if folder.is_dir() for file in folder.iterdir())]
    record_files(root, [file for file in files if file != root / WORK / "status.json"])


def check_whole(root: Path) -> str:
    """Hold an alignment that has ended against its records; returns what is to be said of its pages.

    Asked before whose folder it is, as damage may hide that.

    Raises:
        UserError: naming the files that are not as they were written.
    """
    status = root / WORK / "status.json"
    # A kill just before the end leaves the record of files and the checkpoints.
    if not status.is_file() and (_has_checkpoint(root) or not (root / CHECKSUMS).is_file()):
        return ""
    found = differences(root, everything=True)
    try:
        StepRecord.model_validate(read_json(status))
    except (OSError, CorruptionError, ValueError):
        found[f"{WORK}/{status.name}"] = "is damaged" if status.is_file() else "is missing"
    return still_whole(found, f"--out {root}", "Delete it or pass --fresh to make it again, or give another --out.")


def tidy(work: StepFolder) -> None:
    """Delete what was only needed to go on."""
    for name in ("checkpoints", "export"):
        shutil.rmtree(work.path / name, ignore_errors=True)


def holds_training(root: Path) -> bool:
    """Whether there is anything that took training to make."""
    return (root / WORK / "status.json").exists() or _has_checkpoint(root)


def _has_checkpoint(root: Path) -> bool:
    return any(root.glob(f"{WORK}/checkpoints/checkpoint-*/{CHECKPOINT_COMPLETE}"))


def _different(old: Any, new: Any, key: str = "") -> list[str]:
    """Keys whose values differ, with both values where they are short."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        inner = (_different(old.get(n), new.get(n), f"{key}.{n}" if key else n) for n in names)
        return [one for found in inner for one in found]
    if old == new:
        return []
    there, here = json.dumps(old), json.dumps(new)
    return [f"{key} (there {there}, here {here})" if max(len(there), len(here)) <= 40 else key]


def _strange(root: Path) -> list[str]:
    """What is not an alignment's."""
    begun = root / WORK
    # Of an alignment that has ended, the record of files is as good a sign: step.json may be what was lost.
    if (begun / "step.json").exists() or (begun.is_dir() and (root / CHECKSUMS).exists()):
        return sorted(path.name for path in root.iterdir() if not _OWN.fullmatch(path.name))
    # A kill just after the folder was made leaves `training` without a record.
    ours = not any(path.is_file() and not path.name.startswith(".") for path in begun.rglob("*"))
    return sorted(p.name for p in root.iterdir() if not p.name.startswith(".") and not (ours and p == begun))
