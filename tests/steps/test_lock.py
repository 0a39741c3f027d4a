"""A folder that another holds is waited for as long as one has patience, and by default not at all."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.steps.lock import FolderLock, FolderTakenError, patient


def test_a_folder_that_another_holds_is_refused_at_once(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "here"), pytest.raises(FolderTakenError) as caught:
        FolderLock(tmp_path, "here").take()
    assert "another harness process" in str(caught.value)


def test_patience_waits_until_it_is_let_go(tmp_path: Path) -> None:
    first, ended = FolderLock(tmp_path, "here"), threading.Event()
    first.take()

    def let_go() -> None:
        time.sleep(0.3)
        ended.set()
        first.release()

    threading.Thread(target=let_go).start()
    with patient(30), FolderLock(tmp_path, "here"):
        assert ended.is_set()


def test_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves only while the lock sleeps."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr("harness.steps.lock.time", clock)
    with FolderLock(tmp_path, "here"), patient(0.3), pytest.raises(FolderTakenError):
        FolderLock(tmp_path, "here").take()
    assert sum(slept) >= 0.3
