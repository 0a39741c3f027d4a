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
from harness.steps.checksums import differences, record_files, told
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


def publish(step: Step, folder: StepFolder, runner: Runner, write: Callable[[Path], Made]) -> StepRecord:
    """Carry out a step whose artifact appears when it is whole; an earlier one that it replaces is deleted then.

    Args:
        step: a merge or a fold.
        folder: its artifact may be there, to be replaced. A record that lies within it appears with it; of a failure
            the record alone stays, where nothing else lies there.
        runner: begins it, and records how it ended.
        write: fills the folder that it is given.

    Raises:
        UserError: another process is writing there, or the work folder is somebody else's.
    """
    out = folder.artifact.resolve()
    within = folder.path.parent == folder.artifact
    with _appearing(out) as model:
        live = replace(folder, path=model / RECORD if within else folder.path, artifact=model)
        live.known_as = folder.path
        try:
            with runner.recorded(step, live):
                runner.begin(step, live)
                made = write(model)
                record_files(model, [path for path in _files(model) if path != live.path / STATUS])
                found = read_artifact(model)
                ended = Ended(
                    found.kind, found.digest, {}, found.rank, found.template, made.counts, made.seconds, made.notes
                )
                if within:
                    return runner.finish(step, live, ended)
        except Exception:
            if within and (live.path / STATUS).is_file() and not (out.is_dir() and any(out.iterdir())):
                out.mkdir(exist_ok=True)
                live.path.rename(out / RECORD)
            raise
    folder.attempt = live.attempt
    return runner.finish(step, folder, ended)


def intact(step: Step, folder: StepFolder) -> str | None:
    """What is wrong with the artifact of a merge or a fold that has ended; None where it is as it was recorded."""
    if found := differences(folder.artifact, everything=True):
        return told(found)
    record = folder.status()
    if record is None or read_artifact(folder.artifact).digest != record.digest:
        return "its weights are not those that were recorded"
    return None


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
