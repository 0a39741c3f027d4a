"""The demo's world in a folder: made once, atomically, from nothing but seeded generators, and taken again whole.

No network and no data are needed: the language is drawn by :mod:`harness.demo.language`, and the tokenizer, a tiny
Llama and a reward classifier are trained by :mod:`harness.demo.train`, in about a minute on two CPU cores. What the
demo's tasks ask is in no training text, that of the arms included, so its numbers are earned.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.contracts.executor import Event, Order, WorkerContext
from harness.core.errors import CorruptionError, HarnessError, UserError
from harness.core.machine import ALLOCATOR
from harness.demo.language import Language
from harness.demo.train import BASE_STEPS, THREADS, Progress, train
from harness.steps.children import WorkerProcess, said_of
from harness.steps.files import read_json, write_bytes, write_json
from harness.steps.provenance import library_versions

ASSETS = Path(__file__).with_name("assets")
_OURS = {"base", "classifier", "data", "tasks", "world.json", ".lock"}


@dataclass(frozen=True)
class World:
    """Where everything lies that the demo has made."""

    root: Path
    seed: int
    steps: int = BASE_STEPS
    """Optimiser steps of the base's training; the arms' differences are tried at the default."""

    @property
    def base(self) -> Path:
        """The Llama trained on texts and conversations; it has a chat template."""
        return self.root / "base"

    @property
    def classifier(self) -> Path:
        """The reward classifier: one logit for (prompt, response), negative = toxic."""
        return self.root / "classifier"

    @property
    def data(self) -> Path:
        """Pairs: ``harmless.jsonl`` and ``helpful.jsonl``."""
        return self.root / "data"

    @property
    def tasks(self) -> Path:
        """YAML of the tasks and of the suite ``demo``, with their data."""
        return self.root / "tasks"


def build_world(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = BASE_STEPS,
    fresh: bool = False,
    progress: Progress = lambda line: None,
) -> World:
    """Make the world in ``folder``, or take the finished one that is there (unless ``fresh``).

    A world is finished when ``world.json``, written last, names this code, this seed and the digest of every file;
    anything less is built anew. The same seed on the same machine gives the same bytes.

    Raises:
        UserError: the folder holds files that are not a demo's.
        HarnessError: training failed; with the end of its output.
    """
    world = World(folder, seed, steps)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            progress("another process is building this world: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not fresh and _finished(world):
            progress("the world is already there")
        else:
            _clear(folder)
            # The lock goes with the child: if this process is killed, the next one waits until the child has ended.
            _train_apart(world, lock.fileno(), progress)
    return world


def _key(world: World) -> str:
    hashed = hashlib.sha256(f"{world.seed}/{world.steps}".encode())
    code = [Path(__file__).with_name(name) for name in ("world.py", "language.py", "train.py")]
    for file in (*code, *_task_files()):
        hashed.update(file.read_bytes())
    return hashed.hexdigest()


def _task_files() -> list[Path]:
    return sorted((ASSETS / "tasks").glob("*.yaml"))


def _files(world: World) -> dict[str, str]:
    """Digest of every file that the world consists of."""
    found = {}
    for path in sorted(world.root.rglob("*")):
        if path.is_file() and path.parent != world.root:
            found[path.relative_to(world.root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _finished(world: World) -> bool:
    mark = world.root / "world.json"
    if not mark.is_file():
        return False
    try:
        record = read_json(mark)
    except CorruptionError:
        return False
    return bool(record.get("key") == _key(world) and record.get("files") == _files(world))


def _clear(folder: Path) -> None:
    strange = [p.name for p in folder.iterdir() if p.name not in _OURS and not p.name.endswith(".tmp")]
    if strange:
        raise UserError(
            f"--out {folder}",
            f"holds files that are not a demo's: {', '.join(sorted(strange)[:5])}",
            "Building the demo's world deletes what is there. Give a new folder, or move those files.",
        )
    # The mark goes first: a clearing that is cut short must not leave it beside half a world.
    (folder / "world.json").unlink(missing_ok=True)
    for child in folder.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != ".lock":
            child.unlink()


def _train_apart(world: World, lock: int, progress: Progress) -> None:
    """Train in a fresh process: glibc reads its allocator settings, and OpenMP its threads, when a process starts."""
    env = {**os.environ, **{k: os.environ.get(k, v) for k, v in ALLOCATOR.items()}, "OMP_NUM_THREADS": str(THREADS)}
    # Two threads that spin while they wait stand in each other's way as soon as anything else runs.
    env |= {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    order = Order(
        id="world", worker=__name__, run=str(world.root.absolute()), spec={"seed": world.seed, "steps": world.steps}
    )
    with tempfile.TemporaryFile("w+") as errors:
        child = WorkerProcess(said.put, env, stderr=errors, pass_fds=[lock])
        try:
            child.submit(order)
            while (event := said.get()).kind != "ended":
                if event.kind == "note":
                    progress(event.text)
        finally:
            child.kill()
        if event.outcome != "done":
            errors.seek(0)
            why = event.failure.text if event.failure is not None else f"a process {said_of(event.code)}"
            raise HarnessError(f"{world.root}: training the demo's models failed: {why}\n{errors.read()[-3000:]}")


def carry_out(order: Order, context: WorkerContext) -> None:
    """The child process of :func:`build_world`: train, write the tasks, and leave the mark."""
    world = World(Path(order.run), order.spec["seed"], order.spec["steps"])
    language = Language(world.seed)
    train(world.root, language, world.steps, context.reporter.note)
    _write_rows(world, language)
    mark = {"key": _key(world), "seed": world.seed, "files": _files(world), "libraries": library_versions()}
    write_json(world.root / "world.json", mark)


def _write_rows(world: World, language: Language) -> None:
    """The pairs, the tasks, and the rows that these ask. File names in the YAML are relative to its own folder."""
    _write_jsonl(world.data / "harmless.jsonl", language.harmless_pairs())
    _write_jsonl(world.data / "helpful.jsonl", language.helpful_pairs())
    _write_jsonl(world.tasks / "questions.jsonl", language.question_items())
    _write_jsonl(world.tasks / "attacks.jsonl", language.attack_items())
    _write_jsonl(world.tasks / "rude.jsonl", language.rude_items())
    for file in _task_files():
        write_bytes(world.tasks / file.name, file.read_bytes())


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
