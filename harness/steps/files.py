"""Files that are whole or absent: atomic, durable writes, and JSON read back with the damage named."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.core.records import SCHEMA_VERSION

FSYNC_SECONDS = 1.0
"""A batch reaches the kernel before it counts (so it survives SIGKILL) and the disk within this time."""

CHECKSUM = "checksum"
"""Last key of every JSON file that :func:`write_json` wrote: SHA-256 of the text before it."""


def slug(text: str) -> str:
    """A name that is safe as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "-", text).strip("-.")[:60] or "x"


def stays_inside(name: str) -> bool:
    """Whether a file name that a record or an index gives stays in its folder: no absolute path, no ``..``."""
    path = PurePosixPath(name)
    return name not in ("", ".") and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file atomically and durably: temporary name, fsync, rename, fsync of the folder.

    ``durable=False``: without the two fsyncs, for what may be lost with the machine.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            fsync_folder(path.parent)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write JSON for people and machines (sorted keys, indented); an object with a schema version and a checksum."""
    data = value
    if isinstance(value, dict):
        data = {"schema_version": SCHEMA_VERSION, **{key: kept for key, kept in value.items() if key != CHECKSUM}}
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False).encode()
    sealed = _sealed(text.removesuffix(b"\n}")) if isinstance(value, dict) else text + b"\n"
    write_bytes(path, sealed, durable=durable)


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
