"""The folder of a merged model: it gets its name when it is whole, and nobody else's folder is touched.

All is written into ``.NAME.merge/model`` beside the folder, under a lock that goes with the process, and renamed at
the end. What a killed merge leaves there the next one clears away, and starts clean.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from harness.core.errors import UserError
from harness.core.records import StepRecord
from harness.models.artifact import read_artifact
from harness.steps.checksums import record_files
from harness.steps.files import fsync_folder
from harness.steps.folder import RECORD, STATUS, STEP, StepFolder
from harness.steps.guard import Guard
from harness.steps.lock import LOCK, FolderLock
from harness.steps.runner import Ended, Runner
from harness.steps.step import Step

MERGE = "merge.json"
"""What a merge was and came to, for people and pages; for a fold ``fold.json``."""
FOLD = "fold.json"
MERGED = Guard(
    "merge",
    rf"{RECORD}|merge\.json|checksums\.json|merge_stats\.jsonl|merge\.html|fold\.json|lineage\.json|README\.md|config\.json|"
    r"generation_config\.json|adapter_model[\w.-]*\.(safetensors|json)|adapter_config\.json|"
    r"model[\w.-]*\.(safetensors|json)|chat_template\.(jinja|json)|tokenizer[\w.]*|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.\w+|merges\.txt|spiece\.model|(pre)?processor_config\.json|[\w.-]+\.py",
    f"{RECORD}/{STEP}",
)
FOLDED = replace(MERGED, word="fold")


@dataclass(frozen=True)
class Made:
    """What the writing of a merge gives for its record."""

    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]


def publish(step: Step, out: Path, runner: Runner, write: Callable[[Path], Made]) -> StepRecord:
    """Carry out a step whose folder appears when it is whole; an earlier one that it replaces is deleted then.

    Args:
        step: a merge or a fold.
        out: may hold what it is to replace.
        runner: begins it, and records how it ended; of a failure the record alone stays, where nothing else lies there.
        write: fills the folder that it is given.

    Raises:
        UserError: another process is writing there, or the work folder is somebody else's.
    """
    out = out.resolve()
    with _appearing(out) as model:
        folder = StepFolder.within(model, step.id, step.kind)
        folder.known_as = out / RECORD
        try:
            with runner.recorded(step, folder):
                runner.begin(step, folder)
                made = write(model)
                record_files(model, [path for path in _files(model) if path != folder.path / STATUS])
                found = read_artifact(model)
                ended = Ended(
                    found.kind, found.digest, {}, found.rank, found.template, made.counts, made.seconds, made.notes
                )
                return runner.finish(step, folder, ended)
        except Exception:
            if (folder.path / STATUS).is_file() and not (out.is_dir() and any(out.iterdir())):
                out.mkdir(exist_ok=True)
                folder.path.rename(out / RECORD)
            raise


def _files(model: Path) -> Iterator[Path]:
    for path in model.iterdir():
        yield from path.iterdir() if path.is_dir() else [path]


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write into; at the end of the block it gets its name, and on an error it is deleted."""
    work = out.parent / f".{out.name}.merge"
    try:
        with FolderLock(work, MERGED.where(out)):
            strange = sorted(path.name for path in work.iterdir() if path.name not in (LOCK, "model", "replaced"))
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
