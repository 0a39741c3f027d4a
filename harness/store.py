"""Every file name of a run, atomic writes, and the journal that answers go to before they count.

Layout (``runs/<name>/``)::

    plan.json                       what was asked, every default filled in
    parity.json                     what a second engine answered to some of it, where that was asked for
    requests/<digest>.jsonl.gz      each distinct list of samples and requests once
    steps/<kind>-<arm>-<id>/        step.json provenance.json log.jsonl artifact/ status.json (last, atomically)
    judge/<name>-<digest>.jsonl.gz  what a judge said, whatever step asked
    report/                         rebuilt from the records at any time

No file holds an absolute path, so a run can be moved or published.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from harness.errors import CorruptionError, UserError
from harness.records import SCHEMA_VERSION, StepKind, StepRecord, canonical

FSYNC_SECONDS = 1.0
"""A batch reaches the kernel before it counts (so it survives SIGKILL) and the disk within this time."""

CHECKPOINT_COMPLETE = "complete.json"
"""Written into a checkpoint of training last: without it, it is not one."""

CHECKSUM = "checksum"
"""Last key of every JSON file that :func:`write_json` wrote: SHA-256 of the text before it."""

_MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00"
_PIECE = 16_384
_OWN = re.compile(
    r"\.lock|\.folded|\.(plan\.json|study\.yaml|parity\.json)\.\d+\.tmp"
    r"|plan\.json|study\.yaml|parity\.json|requests|steps|report|judge"
)


def slug(text: str) -> str:
    """A name that is safe as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "-", text).strip("-.")[:60] or "x"


def stays_inside(name: str) -> bool:
    """Whether a file name that a record or an index gives stays in its folder: no absolute path, no ``..``."""
    path = PurePosixPath(name)
    return name not in ("", ".") and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically and durably: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and machines (sorted keys, indented); an object with a schema version and a checksum."""
    data = value
    if isinstance(value, dict):
        data = {"schema_version": SCHEMA_VERSION, **{key: kept for key, kept in value.items() if key != CHECKSUM}}
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False).encode()
    write_bytes(path, _sealed(text.removesuffix(b"\n}")) if isinstance(value, dict) else text + b"\n")


def _sealed(text: bytes) -> bytes:
    """An object, its closing bracket left out, with the checksum of its text as the last key."""
    return text + f',\n  "{CHECKSUM}": "{hashlib.sha256(text).hexdigest()}"\n}}\n'.encode()


def read_json(path: Path) -> Any:
    """Read JSON that this module wrote; without a checksum (as earlier versions wrote it) it is taken as it is.

    Raises:
        CorruptionError: the file is torn, not JSON, or not what was written.
    """
    data = path.read_bytes()
    try:
        value = json.loads(data)
        text = data.rpartition(f',\n  "{CHECKSUM}"'.encode())[0]
        if isinstance(value, dict) and value.pop(CHECKSUM, None) is not None and data != _sealed(text):
            raise ValueError("it is not what was written")
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path}: damaged ({error}); delete it or start over with --fresh") from None
    return value


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_ELSEWHERE = "Lift that limit, or write to another folder, and run the same command again."
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", "Free some space and run the same command again."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space and run the same command again."),
    errno.EFBIG: ("a file may not be so large here: see `ulimit -f`", _ELSEWHERE),
    errno.EROFS: ("the disk is read-only", _ELSEWHERE),
    errno.EACCES: ("access is refused", _ELSEWHERE),
    errno.EPERM: ("access is refused", _ELSEWHERE),
}
_OF_RUST = re.compile(r"\(os error (\d+)\)")
_OF_TORCH = re.compile(r"inline_container\.cc.*unexpected pos|PytorchStreamWriter failed|iostream error", re.DOTALL)


def is_disk_full(error: OSError) -> bool:
    """Whether the system refused to write: for want of space, or because of a limit or a read-only disk."""
    return error.errno in _REFUSALS and not isinstance(error, PermissionError)


def is_refused(error: OSError) -> bool:
    """Whether the system does not take a path as it is: nothing that the code could have known."""
    refusals = ("ENAMETOOLONG", "EACCES", "EPERM", "EROFS", "ELOOP", "ENOTDIR", "EISDIR")
    return error.filename is not None and error.errno in {getattr(errno, name) for name in refusals}


def refusal(error: Exception) -> tuple[str, str] | None:
    """Why the system refused to write, and what to do; None: it did not. Libraries of Rust and C++ give text alone."""
    found = _OF_RUST.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number in _REFUSALS:
        what, fix = _REFUSALS[number]
        return f"{what} ({os.strerror(number)})", fix
    if isinstance(error, RuntimeError) and _OF_TORCH.search(str(error)):
        return "the disk is full, or a file may not be so large here (torch does not say which)", _ELSEWHERE
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one message of whatever is raised within because the system refuses to write.

    Args:
        path: the file that is written, or a folder: then the newest file in it is named, where the error names none.

    Raises:
        UserError: naming file, reason and remedy.
    """
    try:
        yield
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        # Of a file the error knows the temporary name at best.
        named = error.filename if isinstance(error, OSError) and path.is_dir() else None
        raise UserError(str(named or _newest(path)), *refused) from error


def _newest(path: Path) -> Path:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=path)


@dataclass
class Damage:
    """What was wrong with a journal when it was read."""

    torn_bytes: int = 0
    corrupted_members: int = 0

    def __str__(self) -> str:
        parts = []
        if self.corrupted_members:
            parts.append(f"{self.corrupted_members} corrupted batch(es)")
        if self.torn_bytes:
            parts.append(f"a torn batch of {self.torn_bytes} bytes at the end")
        return " and ".join(parts)


def read_members(path: Path) -> tuple[list[tuple[bytes, list[dict[str, Any]]]], Damage]:
    """Read a journal: its intact members (compressed bytes and rows), and what was damaged.

    A member is one batch, protected by gzip's CRC-32. After a damaged member the search goes on at the next member's
    header, so one bad byte costs one batch.
    """
    data = path.read_bytes() if path.exists() else b""
    members: list[tuple[bytes, list[dict[str, Any]]]] = []
    damage = Damage()
    start = 0
    while start < len(data):
        rows, end = _read_member(data, start)
        if rows is not None:
            members.append((data[start:end], rows))
            start = end
            continue
        following = data.find(_MEMBER, start + 1)
        if following < 0:
            damage.torn_bytes = len(data) - start
            break
        damage.corrupted_members += 1
        start = following
    return members, damage


def _read_member(data: bytes, start: int) -> tuple[list[dict[str, Any]] | None, int]:
    """The rows of the member at ``start`` (None if it is damaged) and where the next one begins."""
    decoder = zlib.decompressobj(wbits=31)
    text, position = [], start
    try:
        # In pieces: given all the rest, zlib would copy it once for every member.
        while not decoder.eof and position < len(data):
            piece = data[position : position + _PIECE]
            text.append(decoder.decompress(piece))
            position += len(piece)
        if decoder.eof:
            return [json.loads(line) for line in b"".join(text).splitlines()], position - len(decoder.unused_data)
    except (zlib.error, ValueError):
        pass
    return None, start


class Journal:
    """An append-only file of batches; each batch is one gzip member, so a torn write costs only that batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: IO[bytes] | None = None
        self._synced = time.monotonic()

    def recover(self) -> tuple[list[list[dict[str, Any]]], Damage]:
        """Read the intact batches; when the file is damaged, keep it aside and rewrite what is intact."""
        members, damage = read_members(self.path)
        if damage.torn_bytes or damage.corrupted_members:
            if damage.corrupted_members:
                shutil.copyfile(self.path, self.path.with_name(self.path.name + ".damaged"))
            write_bytes(self.path, b"".join(raw for raw, _ in members))
        return [rows for _, rows in members], damage

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append one batch. When it cannot be written whole, nothing of it stays."""
        text = b"".join(canonical(row) + b"\n" for row in rows)
        member = gzip.compress(text, compresslevel=3, mtime=0)
        with writing(self.path):
            if self._stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self.path.open("ab", buffering=0)
            size = os.fstat(self._stream.fileno()).st_size
            try:
                while member:
                    # Where a write is cut short, the next one says why.
                    member = member[self._stream.write(member) :]
                if time.monotonic() - self._synced > FSYNC_SECONDS:
                    self.sync()
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._stream.fileno(), size)
                raise

    def sync(self) -> None:
        """Force what was appended to the disk."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        if self._stream is not None:
            self.sync()
            self._stream.close()
            self._stream = None


def write_rows(path: Path, rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> str:
    """Write rows as one gzip file, atomically; returns the SHA-256 of their uncompressed form."""
    text = b"".join(canonical(row) + b"\n" for row in rows)
    write_bytes(path, gzip.compress(text, compresslevel=5, mtime=0))
    return hashlib.sha256(text).hexdigest()


def intact(path: Path) -> bool:
    """Whether a gzip file is there and whole; its lines are not parsed."""
    try:
        with gzip.open(path, "rb") as stream:
            while stream.read(1 << 20):
                pass
        return path.stat().st_size > 0
    except (OSError, EOFError, zlib.error):
        return False


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read rows that :func:`write_rows` or a journal wrote.

    Raises:
        CorruptionError: the file is missing, empty, torn or corrupted.
    """
    members, damage = read_members(path)
    if not members and not damage.torn_bytes:
        state = "empty" if path.exists() else "missing"
        raise CorruptionError(f"{path}: {state}; delete its step folder or start over with --fresh")
    if damage.torn_bytes or damage.corrupted_members:
        raise CorruptionError(f"{path}: {damage}; delete its step folder or start over with --fresh")
    return [row for _, rows in members for row in rows]


def rows_digest(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the uncompressed form of rows, as :func:`write_rows` returns it."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(canonical(row) + b"\n")
    return hashed.hexdigest()


@dataclass
class StepFolder:
    """One step's folder."""

    path: Path
    id: str
    kind: StepKind

    @property
    def artifact(self) -> Path:
        """Folder of what the step makes."""
        return self.path / "artifact"

    def begin(self, step: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Write what the step is, before it does anything."""
        self.artifact.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "step.json", {"id": self.id, "kind": self.kind, **step})
        write_json(self.path / "provenance.json", provenance)

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        path = self.path / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def status(self) -> StepRecord | None:
        """The record of an ended step; None while it has not ended (or its status.json is damaged)."""
        path = self.path / "status.json"
        if not path.exists():
            return None
        try:
            return StepRecord.model_validate(read_json(path))
        except (CorruptionError, ValueError):
            self.log("status.json is damaged: the step is checked again")
            return None

    def reopen(self, reason: str) -> None:
        """Take back the end of a step whose artifact no longer holds what was recorded."""
        (self.path / "status.json").unlink(missing_ok=True)
        self.log("reopened", reason=reason)

    def finish(self, record: StepRecord) -> None:
        """Write status.json, last and atomically."""
        fsync_folder(self.artifact)
        write_json(self.path / "status.json", record.model_dump(mode="json"))


def _same_file(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


@dataclass
class RunStore:
    """One run's directory, locked for this process."""

    root: Path
    _lock: IO[str] | None = field(default=None, repr=False)
    _made: bool = field(default=False, repr=False)

    def __enter__(self) -> RunStore:
        self.lock()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            # A run that was refused before it wrote anything leaves no trace.
            if [child.name for child in self.root.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):
                    (self.root / ".lock").unlink()
                    if self._made:
                        self.root.rmdir()
            self._lock.close()
            self._lock = None

    def lock(self) -> None:
        """Take the run for this process; the lock goes with the process, however it ends."""
        try:
            self._made = self._made or not self.root.exists()
            self.root.mkdir(parents=True, exist_ok=True)
            stream = (self.root / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--out {self.root}", f"cannot be written: {error.strerror}", "Give another folder."
            ) from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            stream.close()
            raise UserError(
                f"--out {self.root}",
                f"another harness process (pid {owner}) is writing to this folder",
                "Wait for it to end, stop it, or give another --out.",
            ) from None
        if not _same_file(stream, self.root / ".lock"):
            # Its last owner took the file away between our opening and our locking it.
            stream.close()
            return self.lock()
        stream.seek(0)
        stream.truncate()
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        self._lock = stream
        return None

    @property
    def plan_file(self) -> Path:
        """plan.json."""
        return self.root / "plan.json"

    @property
    def parity_file(self) -> Path:
        """parity.json: what a second engine answered to the same questions."""
        return self.root / "parity.json"

    @property
    def scratch(self) -> Path:
        """Folder of what goes when it has been used: checkpoints with an adapter folded in."""
        return self.root / ".folded"

    @property
    def judge(self) -> Path:
        """The folder of what judges were asked and said, shared by all steps."""
        return self.root / "judge"

    @property
    def report(self) -> Path:
        """The folder of reports."""
        return self.root / "report"

    def requests(self, digest: str) -> Path:
        """File of one list of samples and requests."""
        return self.root / "requests" / f"{digest[:16]}.jsonl.gz"

    def step(self, kind: StepKind, arm: str, step_id: str) -> StepFolder:
        """The folder of one step."""
        return StepFolder(self.root / "steps" / f"{kind}-{slug(arm)}-{step_id[:12]}", step_id, kind)

    def refuse_strangers(self) -> None:
        """Refuse a folder that holds anything but a run; writes nothing.

        Raises:
            UserError: naming what is not a run's.
        """
        self._own_children()

    def _own_children(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        children = sorted(self.root.iterdir(), key=lambda child: child.name == "plan.json")
        # A write that a kill cut short leaves its temporary file behind.
        strange = [child.name for child in children if not _OWN.fullmatch(child.name)]
        if not self.plan_file.exists():
            # Without a plan, folders of these names are somebody else's: every run writes its plan first.
            strange += [child.name for child in children if child.name in ("requests", "steps", "report", "judge")]
        if strange:
            raise UserError(
                f"--out {self.root}",
                f"holds files that are not a run's: {', '.join(sorted(strange)[:5])}",
                "--fresh deletes only what a run wrote. Give another folder, or move those files.",
            )
        return children

    def clear(self) -> None:
        """Delete everything that a run wrote (``--fresh``); refuses a folder that holds anything else."""
        # The plan goes last, so that a clearing that is cut short can be taken up again.
        for child in self._own_children():
            if child.name == ".lock":
                continue
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
