"""What tests of whole evaluations share: a tiny model, a small task, a slow engine, and the command line in-process."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


def _use_shared_caches() -> None:
    """Point Hugging Face's libraries at the shared data; they read these variables once, when they are imported.

    The prepared data sets are copied: datasets writes locks beside what it reads.
    """
    shared = os.environ.get("HARNESS_SHARED")
    if shared is None or "HF_DATASETS_CACHE" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="harness-datasets-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(Path(shared) / "data" / "datasets_cache", folder / "cache", copy_function=shutil.copyfile)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    os.environ.setdefault("HF_HUB_CACHE", str(Path(shared) / "data" / "hub"))


_use_shared_caches()
# A shell starts background jobs with Ctrl-C ignored, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_revisions() -> dict[str, str]:
    """Commit of each shared data set, for ``data_revisions``: samples, not the commits that our loaders pin."""
    hub = Path(os.environ["HARNESS_SHARED"]) / "data" / "hub"
    refs = hub.glob("datasets--*/refs/main")
    return {ref.parts[-3].removeprefix("datasets--").replace("--", "/"): ref.read_text().strip() for ref in refs}


SLOW = Path(__file__).parent / "e2e" / "slow_engine.py"
SUMS = """\
name: sums
prompt: raw
template: "{{ a }}+{{ b }}="
target: "{{ a + b }}"
decoding: {max_new_tokens: 8}
dataset:
  name: jsonl
  options: {path: sums.jsonl}
scorers:
- name: exact_match
"""
N_SUMS = 30
"""The slow engine gets those wrong whose first number is a multiple of 3: 10 of 0..29."""


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a chat template."""
    from harness.testing import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of digests that no other process reads."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def alone(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and none of the user's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-settings"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HARNESS_CONFIG", "SLOW_CALLS", "SLOW_DELAY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def sums(alone: Path) -> Path:
    """A folder with the task ``sums``: 30 additions."""
    folder = alone / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text(SUMS, encoding="utf-8")
    rows = [{"id": f"s{i}", "a": i, "b": 7 * i % 11} for i in range(N_SUMS)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


class Cli:
    """``harness ARGUMENTS`` in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capture, self._monkeypatch = capture, monkeypatch

    def __call__(self, *arguments: str | os.PathLike[str]) -> Ran:
        from harness.cli import app as cli

        self._capture.readouterr()
        real, own = signal.signal, (signal.SIGTERM, signal.SIGUSR1)
        with self._monkeypatch.context() as patch:
            # The test runner's own handlers stay.
            patch.setattr(
                cli.signal, "signal", lambda number, handler: None if number in own else real(number, handler)
            )
            patch.setattr("sys.argv", ["harness", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        captured = self._capture.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)


@pytest.fixture
def cli(alone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """The command line, in this process and in an empty working folder."""
    yield Cli(capsys, monkeypatch)


@pytest.fixture
def slow_eval(tiny: Path, sums: Path) -> list[str]:
    """``harness eval`` of the sums by the slow engine, without --out."""
    return [
        "eval",
        "--model",
        str(tiny),
        "--tasks",
        str(sums),
        "--task",
        "sums",
        "--engine",
        "slow",
        "--plugin",
        str(SLOW),
    ]
