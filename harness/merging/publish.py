"""The folder of a merged model: it gets its name when it is whole, and nobody else's folder is touched.

All is written into ``.NAME.merge/model`` beside the folder, under a lock that goes with the process, and renamed at
the end. What a killed merge leaves there the next one clears away, and starts clean.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.core.progress import Reporter
from harness.steps.checksums import differences, is_recorded, record_files, still_whole
from harness.steps.files import fsync_folder, read_json
from harness.steps.store import RunStore

RECORD = "merge.json"
"""The record of how a folder came about; for a fold ``fold.json``."""
FOLD = "fold.json"
_OWN = re.compile(
    r"merge\.json|checksums\.json|merge_stats\.jsonl|merge\.html|fold\.json|lineage\.json|README\.md|config\.json|generation_config\.json|"
    r"adapter_model[\w.-]*\.(safetensors|json)|adapter_config\.json|model[\w.-]*\.(safetensors|json)|"
    r"chat_template\.(jinja|json)|tokenizer[\w.]*|special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt|"
    r"spiece\.model|(pre)?processor_config\.json|[\w.-]+\.py|\..*"
)
"""Names that a merge leaves in its folder."""


def done_before(out: Path, identity: str, *, fresh: bool, reporter: Reporter) -> dict[str, Any] | None:
    """The record of a folder that holds this very merge, whole; None where there is work to do.

    Raises:
        UserError: the folder is damaged, or holds anything else, and may not be replaced.
    """
    if not out.exists() and not out.is_symlink():
        return None
    if not out.is_dir():
        raise UserError(f"--out {out}", "is no folder", "Give a new folder.")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return None
    record = _record(out)
    # Its record may be what is damaged.
    ours = record is not None or is_recorded(out, RECORD, FOLD)
    strange = [name for name in names if not (ours and _OWN.fullmatch(name))]
    if ours and not fresh and (record is None or record.get("id") == identity):
        found = differences(out, everything=True)
        pages = still_whole(found, f"--out {out}", "Give another --out, or --fresh to make it again.")
        assert record is not None
        reporter.note(f"{out} holds this {record['kind']} already{pages}")
        return record
    if strange:
        raise UserError(
            f"--out {out}",
            f"holds files that are no merge's ({', '.join(strange[:5])})",
            "--fresh deletes only a merge. Give another folder, or move those files."
            if fresh
            else "Give a new folder.",
        )
    if not fresh:
        assert record is not None
        raise UserError(
            f"--out {out}",
            f"holds another result ({record.get('method')}, id {str(record.get('id'))[:12]})",
            "Give another --out, or --fresh to replace it.",
        )
    return None


def _record(out: Path) -> dict[str, Any] | None:
    for name in (RECORD, FOLD):
        with contextlib.suppress(OSError, CorruptionError):
            found = read_json(out / name)
            if isinstance(found, dict):
                return found
    return None


class _Work(RunStore):
    """The lock of the work folder; messages name the folder that the user gave."""

    def __init__(self, root: Path, out: Path) -> None:
        super().__init__(root)
        self.out = out

    def lock(self) -> None:
        try:
            super().lock()
        except UserError as error:
            raise UserError(f"--out {self.out}", error.what, error.fix) from None


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write into; at the end of the block it gets its name, and on an error it is deleted.

    What ``out`` holds then (an earlier merge that :func:`done_before` let pass) is deleted.

    Raises:
        UserError: another process is writing there, or the work folder is somebody else's.
    """
    out = out.resolve()
    work = out.parent / f".{out.name}.merge"
    try:
        with _Work(work, out):
            strange = sorted(path.name for path in work.iterdir() if path.name not in (".lock", "model", "replaced"))
            if strange:
                raise UserError(
                    f"{work}", f"holds files that are no merge's ({', '.join(strange[:5])})", "Move that folder away."
                )
            _restore(work, out)
            model = work / "model"
            shutil.rmtree(model, ignore_errors=True)
            model.mkdir()
            try:
                yield model
                record_files(model, model.iterdir())
                fsync_folder(model)
                if out.is_dir() and any(out.iterdir()):
                    out.rename(work / "replaced")
                model.rename(out)
                fsync_folder(out.parent)
            finally:
                _restore(work, out)
                shutil.rmtree(model, ignore_errors=True)
    finally:
        # The lock's file goes with the lock.
        with contextlib.suppress(OSError):
            work.rmdir()


def _restore(work: Path, out: Path) -> None:
    """What was to be replaced comes back, where the new folder did not take its place."""
    replaced = work / "replaced"
    if not replaced.is_dir():
        return
    if out.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(out)
