"""A lock on a folder that goes with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from harness.core.errors import UserError

LOCK = ".lock"
_PATIENCE: ContextVar[float] = ContextVar("patience", default=0.0)


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Within, a folder that another process holds is waited for so long: that process may be ending, or cut off."""
    before = _PATIENCE.set(seconds)
    try:
        yield
    finally:
        _PATIENCE.reset(before)


class FolderTakenError(UserError):
    """Another process holds the folder."""

    def __init__(self, where: str, owner: str) -> None:
        self.owner = owner
        super().__init__(
            where,
            f"another harness process (pid {owner}) is writing to this folder",
            "Wait for it to end, stop it, or give another --out.",
        )


@dataclass
class FolderLock:
    """One folder, held by this process alone from ``take`` until ``release``."""

    root: Path
    where: str
    """What messages call the folder."""
    keep: bool = True
    """Whether the lock's file stays when the folder is released."""
    _stream: IO[str] | None = field(default=None, repr=False)
    _made: bool = field(default=False, repr=False)

    def __enter__(self) -> FolderLock:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self) -> None:
        """Lock the folder, and make it where it is missing.

        Raises:
            UserError: it cannot be written, or another process holds it.
        """
        end = time.monotonic() + _PATIENCE.get()
        while True:
            try:
                return self._take()
            except FolderTakenError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.2)

    def _take(self) -> None:
        try:
            self._made = self._made or not self.root.exists()
            self.root.mkdir(parents=True, exist_ok=True)
            stream = (self.root / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(self.where, f"cannot be written: {error.strerror}", "Give another folder.") from None
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                # Perhaps somebody only asks whether it is held, which takes no time.
                time.sleep(0.05)
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            stream.close()
            raise FolderTakenError(self.where, owner) from None
        if not _same_file(stream, self.root / LOCK):
            # Its last owner took the file away between our opening and our locking it.
            stream.close()
            return self._take()
        stream.seek(0)
        stream.truncate()
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        self._stream = stream
        return None

    def release(self) -> None:
        """Unlock; a folder that was made for nothing goes."""
        if self._stream is None:
            return
        # What was refused before it wrote anything leaves no trace.
        with contextlib.suppress(OSError):
            nothing = [child.name for child in self.root.iterdir()] == [LOCK]
            if nothing or not self.keep:
                (self.root / LOCK).unlink()
            if nothing and self._made:
                self.root.rmdir()
        self._stream.close()
        self._stream = None


def is_held(root: Path) -> bool:
    """Whether a process holds a folder at this moment; nothing is written, and nobody is kept waiting."""
    try:
        with (root / LOCK).open("rb") as stream:
            # Shared, so that two who ask do not take each other for an owner.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _same_file(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
