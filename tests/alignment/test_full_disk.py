"""The disk fills up, or refuses so large a file: one message that names the file, exit 2, nothing that is untrue."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.processes import as_set, log_of

SMALL = as_set(adapter__rank=1, adapter__targets="[q_proj]", checkpoint_every=2)
TORCH = "the disk is full, or a file may not be so large here (torch does not say which)"
TOO_LARGE = "a file may not be so large here: see `ulimit -f` (File too large)"
GOES_ON = "the last checkpoint is kept: the same command goes on from there"


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """A real refusal by the kernel, of every file above this size (bytes)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("more", "size", "file", "what"),
    [
        (SMALL, 1_000, "step.json", TOO_LARGE),
        (SMALL, 4_500, "checkpoints/checkpoint-2/optimizer.pt", TORCH),
        (SMALL, 12_000, "checkpoints/checkpoint-2/rng_state.pth", TORCH),
        (["--adapter", "none"], 8_000, "checkpoints/checkpoint-6/trainable.safetensors", TOO_LARGE),
    ],
    ids=["a record", "torch's stream", "torch's archive", "safetensors"],
)
def test_before_the_first_checkpoint_nothing_stays(
    cli: Any, command: list[str], alone: Path, more: list[str], size: int, file: str, what: str
) -> None:
    with files_up_to(size):
        ran = cli(*command, "dpo", *more, "--out", "out")
    assert ran.code == 2, ran.err
    assert ran.err.endswith(
        f"error: out/step/{file}: {what}\n"
        "  Lift that limit, or write to another folder, and run the same command again.\n"
    )
    assert "Traceback" not in ran.err and "goes on" not in ran.err
    assert not Path("out").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "heldout.jsonl.gz", "README.md", "status.json"])
def test_after_a_checkpoint_the_same_command_goes_on_from_it(
    cli: Any, command: list[str], alone: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        ran = cli(*command, "dpo", *SMALL, "--out", "out")
    assert ran.code == 2, ran.err
    folder = "out/step" if file in ("heldout.jsonl.gz", "status.json") else "out"
    assert ran.err.endswith(
        f"{GOES_ON}\nerror: {folder}/{file}: the disk is full (No space left on device)\n"
        "  Free some space and run the same command again.\n"
    )
    assert "Traceback" not in ran.err
    assert cli(*command, "dpo", *SMALL, "--out", "out").code == 0
    assert [event["checkpoint"] for event in log_of(Path("out"), "resumed")] == ["checkpoint-6"]
