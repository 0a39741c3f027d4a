"""Nothing lost, nothing silently dropped: torn files, flipped bytes, full disks, killed processes."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord
from harness.steps import guard
from harness.steps.files import read_json, write_bytes, write_json, writing
from harness.steps.folder import StepFolder
from harness.steps.journal import Damage, Journal, read_members, read_rows, rows_digest, write_rows
from harness.steps.step import Step
from harness.steps.store import RUN, RunStore

BATCHES = [[{"id": f"{b}-{i}", "text": "naïve\n\u2028" * b, "p": 0.25} for i in range(3)] for b in range(3)]
HEADER = 10
"""Bytes of a gzip header (RFC 1952, section 2.3)."""


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A closed journal of three batches."""
    made = Journal(tmp_path / "artifact" / "answers.jsonl.gz")
    for batch in BATCHES:
        made.append(batch)
    made.close()
    return made


def sizes(journal: Journal) -> list[int]:
    return [len(raw) for raw, _ in read_members(journal.path)[0]]


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A real process that runs ``code`` with the harness importable."""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


# ------------------------------------------------------------------------------------------------------- journal


def test_a_journal_gives_back_its_batches(journal: Journal) -> None:
    batches, damage = journal.recover()
    assert batches == BATCHES
    assert str(damage) == ""
    # Any tool reads it: members are plain gzip.
    lines = gzip.decompress(journal.path.read_bytes()).decode().split("\n")[:-1]
    assert [json.loads(line) for line in lines] == [row for batch in BATCHES for row in batch]


def test_a_journal_that_is_not_there_is_empty(tmp_path: Path) -> None:
    batches, damage = Journal(tmp_path / "none.jsonl.gz").recover()
    assert (batches, str(damage)) == ([], "")


def test_torn_at_every_byte_the_intact_batches_are_kept_and_the_rest_is_said(journal: Journal) -> None:
    whole = journal.path.read_bytes()
    ends = [sum(sizes(journal)[: n + 1]) for n in range(3)]
    for length in range(len(whole) + 1):
        journal.path.write_bytes(whole[:length])
        batches, damage = journal.recover()
        intact = sum(end <= length for end in ends)
        start = ends[intact - 1] if intact else 0
        assert batches == BATCHES[:intact], length
        assert (damage.torn_bytes, damage.corrupted_members) == (length - start, 0), length
        if length > start:
            assert str(damage) == f"a torn batch of {length - start} bytes at the end"
        assert journal.path.read_bytes() == whole[:start]
        # What is appended now follows on the intact batches.
        journal.append([{"id": "next"}])
        journal.close()
        assert read_members(journal.path)[0][-1][1] == [{"id": "next"}]


def test_a_flipped_byte_costs_its_batch_alone_and_the_damaged_file_is_kept(journal: Journal) -> None:
    whole, lengths = journal.path.read_bytes(), sizes(journal)
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    for member, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        # The header's flags, time and system (bytes 3 to 9) are protected by nothing and carry nothing.
        for offset in [0, 1, 2, *range(HEADER, length)]:
            flipped = bytearray(whole)
            flipped[start + offset] ^= 0x10
            journal.path.write_bytes(flipped)
            batches, damage = journal.recover()
            if offset == length - 9 and batches == BATCHES:
                continue  # the unused bits that fill up the last byte before the checksum
            assert batches == BATCHES[:member] + BATCHES[member + 1 :], (member, offset)
            assert damage.corrupted_members + bool(damage.torn_bytes) == 1
            aside = journal.path.with_name("answers.jsonl.gz.damaged")
            if member < 2:
                assert str(damage) == "1 corrupted batch(es)"
                assert aside.read_bytes() == bytes(flipped)
                aside.unlink()
            assert journal.recover()[1] == Damage()


@pytest.mark.parametrize("offset", range(3, HEADER))
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_an_unprotected_header_never_changes_rows(journal: Journal, offset: int, bit: int) -> None:
    flipped = bytearray(journal.path.read_bytes())
    flipped[offset] ^= 1 << bit
    journal.path.write_bytes(flipped)
    batches, damage = journal.recover()
    assert batches == BATCHES or (batches == BATCHES[1:] and damage.corrupted_members == 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_invents_or_changes_a_row(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damage")
    made = Journal(folder / "j.gz")
    for batch in BATCHES:
        made.append(batch)
    made.close()
    raw = bytearray((folder / "j.gz").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "j.gz").write_bytes(raw)
    members, damage = read_members(folder / "j.gz")
    assert all(rows in BATCHES for _, rows in members)
    assert len(members) == 3 or damage.torn_bytes or damage.corrupted_members


def test_many_small_batches_are_read_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zlib copies what it is given and does not use: never the whole rest of the file, however long that is."""
    given: list[int] = []

    class Decoder:
        def __init__(self, wbits: int) -> None:
            self._decoder = zlib.decompressobj(wbits)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._decoder, name)

        def decompress(self, data: bytes) -> bytes:
            given.append(len(data))
            return self._decoder.decompress(data)

    monkeypatch.setattr("harness.steps.journal.zlib", SimpleNamespace(decompressobj=Decoder, error=zlib.error))
    path, count = tmp_path / "many.gz", 4_000
    path.write_bytes(b"".join(gzip.compress(b'{"id": "%d"}\n' % i, mtime=0) for i in range(count)))
    assert len(read_members(path)[0]) == count
    # One piece for each member, each far smaller than the file's 130 KB.
    assert len(given) == count
    assert max(given) <= 16_384 < path.stat().st_size / 7


def test_lone_surrogates_survive(tmp_path: Path) -> None:
    """JSON from an endpoint may hold half of a surrogate pair, which strict UTF-8 refuses."""
    row = json.loads('{"text": "\\ud83d"}')
    journal = Journal(tmp_path / "j.gz")
    journal.append([row])
    journal.close()
    assert journal.recover()[0] == [[row]]


# ---------------------------------------------------------------------------------------------------- full disks


class _Full:
    """A stream that writes ``room`` bytes and no more, as a full disk does."""

    def __init__(self, stream: Any, room: int) -> None:
        self._stream, self.room = stream, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = self._stream.write(data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_is_said_and_leaves_no_half_batch(journal: Journal, room: int) -> None:
    before = journal.path.read_bytes()
    journal.append([{"id": "opens the stream"}])
    journal._stream = _Full(journal._stream, room)  # type: ignore[assignment]
    with pytest.raises(UserError) as caught:
        journal.append([{"id": f"{i}", "text": os.urandom(16).hex()} for i in range(50)])
    assert "the disk is full (No space left on device)" in str(caught.value)
    batches, damage = Journal(journal.path).recover()
    assert batches == [*BATCHES, [{"id": "opens the stream"}]]
    assert str(damage) == ""
    assert journal.path.read_bytes().startswith(before)


def test_the_file_size_limit_of_the_system_leaves_no_half_batch(tmp_path: Path) -> None:
    """A real refusal by the kernel, in a process of its own."""
    code = (
        "import resource, os\nfrom harness.steps.journal import Journal\n"
        "journal = Journal(__import__('pathlib').Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        "try:\n"
        "    for i in range(100): journal.append([{'id': i, 'text': os.urandom(30).hex()}])\n"
        "except Exception as error: print(i, type(error).__name__, error)\n"
    )
    process = child(code, tmp_path / "j.gz")
    said, _ = process.communicate(timeout=60)
    kept, name = int(said.split()[0]), said.split()[1]
    assert name in ("UserError", "OSError")
    batches, damage = Journal(tmp_path / "j.gz").recover()
    assert [batch[0]["id"] for batch in batches] == list(range(kept))
    assert 0 < kept < 100
    assert str(damage) == ""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 400


def test_a_whole_file_on_a_full_disk_keeps_its_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_bytes(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("plan.json", b"old")]


RUST = "Error while serializing: I/O error: {} (os error {})"
NO_SPACE = "Free some space and run the same command again."
NOT_HERE = "Lift that limit, or write to another folder, and run the same command again."


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full (No space left on device)", NO_SPACE),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up (Disk quota exceeded)", NO_SPACE),
        (OSError(errno.EFBIG, "x"), "a file may not be so large here: see `ulimit -f` (File too large)", NOT_HERE),
        (OSError(errno.EROFS, "x"), "the disk is read-only (Read-only file system)", NOT_HERE),
        (PermissionError(errno.EACCES, "x"), "access is refused (Permission denied)", NOT_HERE),
        # As safetensors and tokenizers, and as torch hand it on.
        (Exception(RUST.format("No space left on device", 28)), "the disk is full (No space left on device)", NO_SPACE),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "the disk is full, or a file may not be so large here (torch does not say which)",
            NOT_HERE,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_refusal_to_write_is_one_message_that_names_the_file(
    tmp_path: Path, error: Exception, what: str, fix: str
) -> None:
    path = tmp_path / "optimizer.pt"
    path.touch()
    for where in (path, tmp_path):
        with pytest.raises(UserError) as caught, writing(where):
            raise error
        assert str(caught.value) == f"{path}: {what}\n  {fix}"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "x"),
        RuntimeError("[enforce fail at inline_container.cc:145] PytorchStreamReader failed reading zip archive"),
        Exception(RUST.format("No such file or directory", 2)),
        ValueError("28"),
    ],
    ids=repr,
)
def test_other_errors_are_left_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error


# ------------------------------------------------------------------------------------------------ atomic writes


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_while_writing_a_file_keeps_its_old_content(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "status.json"
    write_bytes(path, b"old")
    code = (
        "import os, signal, pathlib\nfrom harness.steps import files\n"
        f"os.{moment} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_bytes(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    process = child(code, path)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_rows_in_one_file_and_their_digest(tmp_path: Path) -> None:
    rows = [row for batch in BATCHES for row in batch]
    digest = write_rows(tmp_path / "rows.jsonl.gz", iter(rows))
    assert read_rows(tmp_path / "rows.jsonl.gz") == rows
    assert digest == rows_digest(rows)
    # Not in the time of writing: the same rows are the same bytes.
    first = (tmp_path / "rows.jsonl.gz").read_bytes()
    write_rows(tmp_path / "rows.jsonl.gz", rows)
    assert (tmp_path / "rows.jsonl.gz").read_bytes() == first


def test_rows_torn_at_any_byte_are_never_read_in_part(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    write_rows(path, BATCHES[1])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptionError, match=r"rows\.jsonl\.gz: (a torn batch of|empty)"):
            read_rows(path)
    path.unlink()
    with pytest.raises(CorruptionError, match=r"rows\.jsonl\.gz: missing; delete its step folder"):
        read_rows(path)


def test_no_rows_are_not_a_lost_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl.gz", [])
    assert read_rows(tmp_path / "rows.jsonl.gz") == []


def test_json_carries_the_checksum_of_its_own_text(tmp_path: Path) -> None:
    """By hand: sha256sum of the lines before it, without the last line feed."""
    path = tmp_path / "plan.json"
    write_json(path, {"b": [1.5, None], "a": "ä"})
    text = '{\n  "a": "ä",\n  "b": [\n    1.5,\n    null\n  ],\n  "schema_version": 1'
    checksum = hashlib.sha256(text.encode()).hexdigest()
    assert path.read_text(encoding="utf-8") == f'{text},\n  "checksum": "{checksum}"\n}}\n'
    assert read_json(path) == {"a": "ä", "b": [1.5, None], "schema_version": 1}
    # What was read as plain JSON is written with a checksum of its own.
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "a": "o"})
    assert read_json(path)["a"] == "o"


def test_no_byte_of_json_changes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"mean": 0.25, "nested": {"checksum": "inner"}})
    whole = path.read_bytes()
    expected = read_json(path)
    key = whole.rindex(b'"checksum"')
    for place in range(len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if key < place < key + 9:
            # Under another name it is one key more, and the rest is whole.
            assert read_json(path).items() > expected.items()
            continue
        with pytest.raises(CorruptionError, match=r"plan\.json: damaged"):
            read_json(path)


def test_json_of_earlier_versions_has_no_checksum(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"mean": 0.25}')
    assert read_json(tmp_path / "plan.json") == {"mean": 0.25}


# --------------------------------------------------------------------------------------------------------- steps


def test_status_exists_exactly_when_a_step_has_ended(tmp_path: Path) -> None:
    folder = RunStore(tmp_path).step("answers", "tiny base/mmlu@0", "abcdef0123456789")
    assert folder.path.name == "answers-tiny-base-mmlu@0-abcdef012345"
    folder.begin(Step("answers", folder.id, "arm", {}), {"task": "mmlu@0"}, {"numerics": 1})
    assert folder.status() is None
    record = StepRecord(id=folder.id, kind="answers", status="done", counts={"n": 3})
    folder.finish(record)
    assert folder.status() == record
    folder.reopen("an answer is damaged")
    assert folder.status() is None
    assert '"reason": "an answer is damaged"' in (folder.path / "log.jsonl").read_text()


def test_a_status_torn_at_any_byte_is_no_end(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "step", "abc", "scores", tmp_path / "step" / "artifact")
    folder.begin(Step("scores", "abc", "arm", {}), {}, {})
    folder.finish(StepRecord(id="abc", kind="scores", status="done"))
    whole = (folder.path / "status.json").read_bytes().rstrip()
    for length in range(len(whole)):
        (folder.path / "status.json").write_bytes(whole[:length])
        assert folder.status() is None, length
    assert "status.json is damaged" in (folder.path / "log.jsonl").read_text()


def test_no_file_of_a_run_holds_an_absolute_path(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run") as run:
        folder = run.step("answers", "arm", "0123456789abcdef")
        folder.begin(Step("answers", folder.id, "arm", {}), {"task": "t"}, {"seed": 0})
        folder.log("started", done=0)
        write_rows(folder.artifact / "answers.jsonl.gz", BATCHES[0])
        folder.finish(StepRecord(id=folder.id, kind="answers", status="done"))
        write_json(run.plan_file, {"steps": [folder.path.name]})
    texts = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.suffix != ".gz"]
    assert len(texts) == 6
    assert not any(str(tmp_path).encode() in text for text in texts)
    (tmp_path / "run").rename(tmp_path / "moved")
    status = RunStore(tmp_path / "moved").step("answers", "arm", "0123456789abcdef").status()
    assert status is not None
    assert status.status == "done"


# ---------------------------------------------------------------------------------------------------------- lock

HOLD = """
import pathlib, time
from harness.steps.store import RunStore
run = RunStore(pathlib.Path(sys.argv[1]))
run.__enter__()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    process = child(HOLD, tmp_path / "run")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, RunStore(tmp_path / "run"):
            pass
        assert str(caught.value) == (
            f"--out {tmp_path / 'run'}: another harness process (pid {process.pid}) is writing to this folder\n"
            "  Wait for it to end, stop it, or give another --out."
        )
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    # SIGKILL takes the lock with the process: nothing has to be cleaned up by hand.
    with RunStore(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run"):
        pass
    process = child(HOLD, tmp_path / "run")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait(timeout=60)


# --------------------------------------------------------------------------------------------------------- fresh


def make_run(root: Path) -> RunStore:
    run = RunStore(root)
    run.root.mkdir()
    for name in ("plan.json", ".lock", ".plan.json.123.tmp"):
        (root / name).write_text("{}")
    for name in ("requests", "steps", "report"):
        (root / name / "deep").mkdir(parents=True)
    return run


def test_clear_deletes_what_a_run_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    RUN.clear(run.root)
    assert [path.name for path in run.root.iterdir()] == [".lock"]
    RUN.clear(run.root)


@pytest.mark.parametrize("strange", ["thesis.tex", "notes.tmp", ".plan.json.tmp", "steps.bak", "provenance.json"])
def test_clear_refuses_a_folder_with_a_strangers_file(tmp_path: Path, strange: str) -> None:
    run = make_run(tmp_path / "run")
    (run.root / strange).write_text("mine")
    before = sorted(run.root.rglob("*"))
    with pytest.raises(UserError, match=rf"holds files that are no run's \({strange}\)\n  --fresh deletes only what"):
        RUN.clear(run.root)
    assert sorted(run.root.rglob("*")) == before


def test_clear_refuses_a_folder_named_report_that_no_run_wrote(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"no run's \(report\)"):
        RUN.clear(tmp_path)
    assert (tmp_path / "report" / "thesis.tex").read_text() == "mine"


def test_a_clearing_that_is_cut_short_can_be_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    real: Callable[..., None] = guard.shutil.rmtree
    calls: list[Path] = []

    def cut_short(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(guard.shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        RUN.clear(run.root)
    monkeypatch.setattr(guard.shutil, "rmtree", real)
    RUN.clear(run.root)
    assert [path.name for path in run.root.iterdir()] == [".lock"]


def test_clear_does_not_follow_a_link_out_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("mine")
    guard.shutil.rmtree(run.report)
    run.report.symlink_to(tmp_path / "elsewhere")
    RUN.clear(run.root)
    assert (tmp_path / "elsewhere" / "mine.txt").read_text() == "mine"
    assert not run.report.is_symlink()


def test_json_that_is_deeper_than_python_goes_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(CorruptionError, match=r"plan\.json: damaged"):
        read_json(tmp_path / "plan.json")
