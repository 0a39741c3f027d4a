"""Rows in compressed members that survive a kill at any byte: written, read back, and checked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.core.errors import CorruptionError
from harness.core.records import canonical
from harness.steps.files import FSYNC_SECONDS, write_bytes, writing

_MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00"
_PIECE = 16_384


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
                _unlinked(self.path)
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


def _unlinked(path: Path) -> None:
    """Give a file that other folders hold too (a step that was taken from another run) contents of its own."""
    if path.exists() and path.stat().st_nlink > 1:
        write_bytes(path, path.read_bytes())


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
