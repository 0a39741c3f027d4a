"""Nothing is lost: killed at any moment, the same command ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.processes import Child, Zygote, as_set, log_of

WEIGHTS = "adapter_model.safetensors"
KILL_IN_REFERENCE = """
import os, signal, harness.alignment.pairwise_trainer as t
real, calls = t.pair_logps, []
def pair_logps(*a, **k):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.{name})
    return real(*a, **k)
t.pair_logps = pair_logps
"""
SMALL_BATCHES = """
import harness.alignment.reference
harness.alignment.reference.plan.__defaults__ = (256,)
"""
AT_STEP = """
import os, signal, harness.alignment.driver as t
real, done = t.Driven.training_step, []
def training_step(self, *a, **k):
    loss = real(self, *a, **k)
    if self.state.global_step == {step} and not done:
        done.append(1)
        os.kill(os.getpid(), signal.{name})
    return loss
t.Driven.training_step = training_step
"""
IN_CHECKPOINT = """
import os, signal, torch
real = torch.save
def save(value, file, *a, **k):
    real(value, file, *a, **k)
    if "checkpoint-4" in str(file) and str(file).endswith("optimizer.pt"):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""
IN_EXPORT = """
import os, signal, harness.alignment.export as a
real = a.write_json
def write_json(path, value):
    if path.name == "lineage.json":
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, value)
a.write_json = write_json
"""
BEFORE_STATUS = IN_EXPORT.replace("lineage.json", "status.json").replace("alignment.export", "steps.folder")
AFTER_STATUS = """
import os, signal, harness.alignment.run as a
a.tidy = lambda work: os.kill(os.getpid(), signal.SIGKILL)
"""
NO_RECORD = """
import os, signal, harness.steps.folder as s
s.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the module's processes write into."""
    return tmp_path_factory.mktemp("resume")


@pytest.fixture
def dpo(command: list[str]) -> list[str]:
    """DPO with dropout, a checkpoint every two of six steps."""
    return [*command, "dpo", *as_set(checkpoint_every=2, adapter__dropout=0.2)]


def run(zygote: Zygote, folder: Path, arguments: list[str], out: str, patch: str = "", **env: str) -> tuple[int, str]:
    """One process, to its end: exit code, and what it said."""
    return zygote.run([*arguments, "--out", out], cwd=folder, patch=patch, **env)


@pytest.fixture
def whole(zygote: Zygote, folder: Path, dpo: list[str]) -> bytes:
    """The adapter of an uninterrupted run."""
    if not (folder / "whole" / WEIGHTS).exists():
        code, said = run(zygote, folder, dpo, "whole")
        assert code == 0, said
    return (folder / "whole" / WEIGHTS).read_bytes()


def test_dropout_is_on_and_seeds_matter(zygote: Zygote, folder: Path, dpo: list[str], whole: bytes) -> None:
    """Same seed, same bytes; another seed, or no dropout, other bytes: what resuming must get right is really there."""
    same, other, dry = ("same", dpo), ("other", [*dpo, "--seed", "1"]), ("dry", [*dpo, *as_set(adapter__dropout=0.0)])
    for name, arguments in (same, other, dry):
        assert run(zygote, folder, arguments, name)[0] == 0
    made = {name: (folder / name / WEIGHTS).read_bytes() for name in ("same", "other", "dry")}
    assert made["same"] == whole
    assert made["other"] != whole
    assert made["dry"] != whole
    provenance = json.loads((folder / "whole" / "step" / "provenance.json").read_text())
    assert provenance["engine"]["dropout_in_force"] == [0.2]
    assert provenance["engine"]["trainable_dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("patch", "resumed"),
    [
        (AT_STEP.format(step=1, name="SIGKILL"), None),
        (AT_STEP.format(step=3, name="SIGKILL"), "checkpoint-2"),
        (IN_CHECKPOINT, "checkpoint-2"),
        (IN_EXPORT, "checkpoint-6"),
        (BEFORE_STATUS, "checkpoint-6"),
    ],
    ids=[
        "before a checkpoint",
        "between checkpoints",
        "in a checkpoint",
        "in the export",
        "before the end is on record",
    ],
)
def test_killed(
    zygote: Zygote, folder: Path, dpo: list[str], whole: bytes, patch: str, resumed: str | None, request: Any
) -> None:
    """SIGKILL, then the same command."""
    out = request.node.callspec.id.replace(" ", "-")
    assert run(zygote, folder, dpo, out, patch)[0] == -signal.SIGKILL
    assert not (folder / out / "step" / "status.json").exists()
    code, said = run(zygote, folder, dpo, out)
    assert code == 0, said
    assert (folder / out / WEIGHTS).read_bytes() == whole
    assert [e["checkpoint"] for e in log_of(folder / out, "resumed")] == ([resumed] if resumed else [])
    assert not (folder / out / "step" / "checkpoints").exists()


def test_killed_in_the_reference_pass(zygote: Zygote, folder: Path, dpo: list[str], tmp_path: Path) -> None:
    """What was computed is kept, the rest is computed, and the numbers are the same."""
    code, said = run(zygote, folder, dpo, "whole2", SMALL_BATCHES, HARNESS_CACHE=str(tmp_path / "a"))
    assert code == 0, said
    all_rows = log_of(folder / "whole2", "reference")[0]
    assert all_rows["computed"] == all_rows["rows"]
    patch = SMALL_BATCHES + KILL_IN_REFERENCE.format(name="SIGKILL")
    assert run(zygote, folder, dpo, "killed2", patch, HARNESS_CACHE=str(tmp_path / "b"))[0] == -signal.SIGKILL
    code, said = run(zygote, folder, dpo, "killed2", SMALL_BATCHES, HARNESS_CACHE=str(tmp_path / "b"))
    assert code == 0, said
    rest = log_of(folder / "killed2", "reference")[0]
    assert 0 < rest["computed"] < all_rows["computed"]
    assert (folder / "killed2" / WEIGHTS).read_bytes() == (folder / "whole2" / WEIGHTS).read_bytes()


def test_killed_after_the_end(zygote: Zygote, folder: Path, dpo: list[str], whole: bytes) -> None:
    """The end is on record before what was needed to go on is deleted."""
    assert run(zygote, folder, dpo, "ended", AFTER_STATUS)[0] == -signal.SIGKILL
    code, said = run(zygote, folder, dpo, "ended")
    assert (code, "holds this alignment already" in said) == (0, True)
    assert (folder / "ended" / WEIGHTS).read_bytes() == whole
    assert not (folder / "ended" / "step" / "checkpoints").exists()


def test_killed_before_there_is_a_record(zygote: Zygote, folder: Path, dpo: list[str], whole: bytes) -> None:
    """A folder with nothing in it yet is nobody else's."""
    assert run(zygote, folder, dpo, "bare", NO_RECORD)[0] == -signal.SIGKILL
    assert (folder / "bare" / "step").is_dir()
    assert run(zygote, folder, dpo, "bare")[0] == 0
    assert (folder / "bare" / WEIGHTS).read_bytes() == whole


@pytest.mark.slow
def test_killed_again_and_again(zygote: Zygote, folder: Path, dpo: list[str], whole: bytes) -> None:
    """At moments that nobody chose; the same bytes whenever it gets through."""
    draw = random.Random(3)
    for attempt in range(40):
        child: Child = zygote.start([*dpo, "--out", "often"], cwd=folder)
        # At first too early to get anywhere, then later and later.
        time.sleep(draw.uniform(0.05, 0.3 + 0.1 * attempt))
        if (folder / "often" / "step" / "status.json").exists():
            assert child.wait() == 0
            break
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert run(zygote, folder, dpo, "often")[0] == 0
    assert (folder / "often" / WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75), ("SIGUSR1", 75)])
def test_signals(zygote: Zygote, folder: Path, dpo: list[str], whole: bytes, name: str, code: int) -> None:
    """The step in hand is ended and saved; the same command goes on from there."""
    ended, said = run(zygote, folder, dpo, name, AT_STEP.format(step=2, name=name))
    assert ended == code, said
    assert "stopping after this step" in said
    assert "Traceback" not in said
    assert run(zygote, folder, dpo, name)[0] == 0
    assert [e["checkpoint"] for e in log_of(folder / name, "resumed")] == ["checkpoint-3"]
    assert (folder / name / WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_signals_in_the_reference_pass(
    zygote: Zygote, folder: Path, dpo: list[str], tmp_path: Path, name: str, code: int
) -> None:
    """There is no step to end: it stops at once, with the same exit codes."""
    patch = SMALL_BATCHES + KILL_IN_REFERENCE.format(name=name)
    ended, said = run(zygote, folder, dpo, f"reference-{name}", patch, HARNESS_CACHE=str(tmp_path / "own"))
    assert (ended, "Traceback" in said) == (code, False), said


def test_a_repeated_sigterm_still_saves(zygote: Zygote, folder: Path, dpo: list[str]) -> None:
    """Schedulers send it more than once."""
    once = "os.kill(os.getpid(), signal.SIGTERM)"
    patch = AT_STEP.format(step=2, name="SIGTERM").replace(once, f"{once}; {once}")
    assert patch.count(once) == 2
    ended, said = run(zygote, folder, dpo, "twice", patch)
    assert ended == 75, said
    assert (folder / "twice" / "step" / "checkpoints" / "checkpoint-3" / "complete.json").exists()


def test_incomplete_checkpoints_are_never_used(tmp_path: Path) -> None:
    """Newest by number, not by name; without complete.json it is none, and goes."""
    from harness.alignment.driver import last_checkpoint

    for step, complete in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainable.safetensors").write_bytes(b"x")
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()
    assert last_checkpoint(tmp_path / "none") is None


def test_full_fine_tuning_resumes_with_the_reference_of_the_original(
    zygote: Zygote, folder: Path, command: list[str], tmp_path: Path
) -> None:
    """With `none` there is no adapter to switch off: the reference must not come from trained weights."""
    full = [*command, "dpo", "--adapter", "none", *as_set(checkpoint_every=2)]
    assert run(zygote, folder, full, "full", HARNESS_CACHE=str(tmp_path / "a"))[0] == 0
    killed = AT_STEP.format(step=4, name="SIGKILL")
    assert run(zygote, folder, full, "full2", killed, HARNESS_CACHE=str(tmp_path / "b"))[0] == -signal.SIGKILL
    # The store is gone: the second process has to compute it again, with a checkpoint of trained weights at hand.
    code, said = run(zygote, folder, full, "full2", HARNESS_CACHE=str(tmp_path / "c"))
    assert code == 0, said
    assert log_of(folder / "full2", "resumed")
    reference = log_of(folder / "full2", "reference")[-1]
    assert reference["computed"] == reference["rows"]
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("full", "full2")]
    assert weights[0] == weights[1]
    stores = [next((tmp_path / name / "reference").glob("*.jsonl.gz")) for name in "ac"]
    assert gzip.decompress(stores[0].read_bytes()) == gzip.decompress(stores[1].read_bytes())
