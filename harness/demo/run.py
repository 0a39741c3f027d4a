"""``harness demo``: build a small world from nothing, train two models in it, and evaluate them.

No network and no data are needed: the language is drawn from seeded generators (:mod:`harness.demo.language`), the
tokenizer, a tiny Llama, its chat-tuned form and a reward classifier are trained here, in well under a minute on two
CPU cores. What the demo's tasks ask is in no training text, so its numbers are earned.
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
from typing import TYPE_CHECKING, Any

import yaml

from harness.contracts.executor import Event, Order, WorkerContext
from harness.contracts.registry import Registry, load_plugins
from harness.core.errors import CorruptionError, HarnessError, UserError
from harness.core.machine import ALLOCATOR
from harness.core.progress import Reporter
from harness.core.text import number, task_label
from harness.demo.language import Language
from harness.demo.train import THREADS, Progress, train
from harness.evaluation.run import Evaluation, evaluate
from harness.report.build import write_reports
from harness.report.compare import compare_runs
from harness.report.compare_text import comparison_table
from harness.report.model import ComparisonReport
from harness.report.text import FIGURES, figures_table, interval_text, mean_text, metric_label
from harness.steps.children import WorkerProcess, said_of
from harness.steps.files import read_json, write_bytes, write_json
from harness.steps.provenance import library_versions
from harness.steps.store import RunStore

if TYPE_CHECKING:
    from rich.table import Table

SUITE = "demo"
PROMPT = "raw"
"""Both models are asked the same text: the base knows no conversations, and what differs in prompt has no verdict."""
_OURS = {"base", "instruct", "classifier", "tasks", "world.json", ".lock"}


@dataclass(frozen=True)
class World:
    """Where everything lies that the demo has made."""

    root: Path
    seed: int

    @property
    def base(self) -> Path:
        """The Llama trained on plain text."""
        return self.root / "base"

    @property
    def instruct(self) -> Path:
        """The base continued on conversations; it has a chat template."""
        return self.root / "instruct"

    @property
    def classifier(self) -> Path:
        """The reward classifier: one logit for (prompt, response), negative = toxic."""
        return self.root / "classifier"

    @property
    def tasks(self) -> Path:
        """YAML of the tasks and of the suite ``demo``, with their data."""
        return self.root / "tasks"


def build_world(folder: Path, *, seed: int = 0, fresh: bool = False, progress: Progress = lambda line: None) -> World:
    """Make the world in ``folder``, or take the finished one that is there (unless ``fresh``).

    A world is finished when ``world.json``, written last, names this code, this seed and the digest of every file;
    anything less is built anew. The same seed on the same machine gives the same bytes.

    Raises:
        UserError: the folder holds files that are not a demo's.
        HarnessError: training failed; with the end of its output.
    """
    world = World(folder, seed)
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
    _write_toxicity_task(world)
    return world


def _key(seed: int) -> str:
    hashed = hashlib.sha256(str(seed).encode())
    for name in ("run.py", "language.py", "train.py"):
        hashed.update(Path(__file__).with_name(name).read_bytes())
    return hashed.hexdigest()


def _files(world: World) -> dict[str, str]:
    """Digest of every file that the world consists of."""
    found = {}
    for path in sorted(world.root.rglob("*")):
        if path.is_file() and path.parent != world.root and path != _toxicity_file(world):
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
    return bool(record.get("key") == _key(world.seed) and record.get("files") == _files(world))


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
    order = Order(id="world", worker=__name__, run=str(world.root.absolute()), spec={"seed": world.seed})
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
    world = World(Path(order.run), order.spec["seed"])
    language = Language(world.seed)
    train(world.root, language, context.reporter.note)
    _write_tasks(world, language)
    mark = {"key": _key(world.seed), "seed": world.seed, "files": _files(world), "libraries": library_versions()}
    write_json(world.root / "world.json", mark)


# ------------------------------------------------------------------------------------------------------ the tasks


def _toxicity_file(world: World) -> Path:
    return world.tasks / "toxicity.yaml"


def _write_yaml(path: Path, value: dict[str, Any]) -> None:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_bytes(path, text.encode())


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _write_tasks(world: World, language: Language) -> None:
    """The tasks, their data, and the suite. File names in the YAML are relative to the YAML's own folder."""
    facts = {
        "task": "demo_facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "facts.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1, "summary": "properties of creatures that follow from their kind, never stated"},
    }
    _write_jsonl(world.tasks / "lm_eval" / "facts.jsonl", language.facts_items())
    _write_yaml(world.tasks / "lm_eval" / "facts.yaml", facts)
    answers = {
        "name": "demo_answers",
        "summary": "facts never stated, asked for in free form and wanted in short",
        "source": "generated by harness demo",
        "licence": "Apache-2.0",
        "prompt": PROMPT,
        "template": "{{ prompt }}",
        "target": "{{ answer }}",
        "decoding": {"max_new_tokens": 16, "stop": ["\n"]},
        "dataset": {"name": "jsonl", "options": {"path": "answers.jsonl"}},
        "scorers": [{"name": "exact_match"}],
    }
    _write_jsonl(world.tasks / "answers.jsonl", language.answer_items())
    _write_yaml(world.tasks / "answers.yaml", answers)
    _write_jsonl(world.tasks / "openings.jsonl", language.opening_items("rude"))
    suite = {
        "suite": SUITE,
        "summary": "the world of `harness demo`: helpful (facts, answers) and harmless (toxicity)",
        "tasks": ["demo_facts", "demo_answers", "demo_toxicity"],
    }
    _write_yaml(world.tasks / "suite.yaml", suite)


def _write_toxicity_task(world: World) -> None:
    """The one file that names a folder of this machine; written anew when the world has been moved."""
    toxicity = {
        "name": "demo_toxicity",
        "summary": "continuations of rude openings between people who never speak to each other in training text",
        "source": "generated by harness demo",
        "licence": "Apache-2.0",
        "prompt": PROMPT,
        "template": "{{ prompt }}",
        "decoding": {"max_new_tokens": 32},
        "dataset": {"name": "jsonl", "options": {"path": "openings.jsonl"}},
        "scorers": [{"name": "toxicity", "options": {"model": str(world.classifier.resolve())}}],
    }
    _write_yaml(_toxicity_file(world), toxicity)


# -------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Demo:
    """What the demo leaves behind: its world, one evaluation per arm, and the arms compared."""

    world: World
    arms: Mapping[str, Evaluation]
    comparison: ComparisonReport


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    fresh: bool = False,
    engine: str = "transformers",
    registry: Registry | None = None,
    reporter: Reporter | None = None,
) -> Demo:
    """Build the world in ``out/world``, evaluate both arms on the suite ``demo``, and print the leaderboard.

    Args:
        out: folder of everything; what is there already is kept.
        seed: of the language, the training and the evaluation.
        fresh: build and evaluate anew.
        engine: transformers by default: for a model this small, starting another engine would take most of the time.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.

    Raises:
        UserError: the folder holds something else.
    """
    from rich.console import Console

    reporter = reporter or Reporter()
    registry = registry or load_plugins()
    world = build_world(out / "world", seed=seed, fresh=fresh, progress=reporter.note)
    arms: dict[str, Evaluation] = {}
    for model in (world.base, world.instruct):
        arms[model.name] = evaluate(
            str(model),
            suite=SUITE,
            task_folders=(str(world.tasks),),
            engine=engine,
            seed=seed,
            out=out / model.name,
            fresh=fresh,
            registry=registry,
            reporter=reporter,
        )
        write_reports(out / model.name)
    reporter.close()
    demo = Demo(world, arms, compare_runs(out / world.base.name, out / world.instruct.name, seed=seed))
    console = Console()
    console.print(leaderboard(arms))
    console.print(comparison_table(demo.comparison))
    for name in arms:
        console.print(
            f"{name}: {RunStore(out / name).report / 'report.html'}", soft_wrap=True, highlight=False, markup=False
        )
    return demo


def leaderboard(arms: Mapping[str, Evaluation]) -> Table:
    """The arms' primary numbers, task by task."""
    from rich.text import Text

    table = figures_table(Text("demo", "bold"), "task, metric; arm", FIGURES)
    rows = [(name, row) for name, evaluation in arms.items() for row in evaluation.rows if row.primary]
    for task, variant, metric in dict.fromkeys((row.task, row.variant, row.metric) for _, row in rows):
        chosen = [(name, row) for name, row in rows if (row.task, row.variant, row.metric) == (task, variant, metric)]
        table.add_row(Text.assemble(task_label(task, variant), "\n  ", (metric_label(chosen[0][1]), "dim")))
        for name, row in chosen:
            numbers = (interval_text(row), number(row.chance), f"{row.n:,}", str(row.n_unscored), str(row.n_truncated))
            table.add_row(f"    {name}", Text(mean_text(row), style="bold"), *map(Text, numbers))
    return table
