"""``harness demo``: make a small world from nothing, and study in it what this project is for.

SFT and DPO on harmless and on helpful pairs, three seeds, merges of both, two kinds of harm and one of help: an
ordinary study, whose YAML lies in the demo's folder. What must be true of the world by the way it was made is what the
study claims.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.contracts.registry import Registry, load_plugins
from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.core.text import first_line, visible
from harness.demo.train import BASE_STEPS, THREADS
from harness.demo.world import ASSETS, World, build_world
from harness.report.board.model import Board
from harness.report.board.text import board_table
from harness.report.board.write import write_board
from harness.report.build import write_all
from harness.steps.files import write_bytes
from harness.study.arms import arms_of
from harness.study.outline import counted
from harness.study.plan import plan_study
from harness.study.run import run_study
from harness.study.spec import find_study, read_study

STUDY = ASSETS / "study.yaml"


@dataclass(frozen=True)
class Demo:
    """What the demo leaves behind."""

    world: World
    root: Path
    """Run folder of its study."""
    board: Board
    failures: Mapping[str, str]
    """Step folder or arm -> why it failed, or was left out."""


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    steps: int = BASE_STEPS,
    fresh: bool = False,
    changes: tuple[str, ...] = (),
    registry: Registry | None = None,
    reporter: Reporter | None = None,
) -> Demo:
    """Make the world in ``out/world``, run the study ``out/study.yaml`` in ``out/run``, and print what came out.

    Args:
        out: folder of everything; what is there already is kept, and gone on with.
        seed: of the world.
        steps: optimiser steps of its base's training.
        fresh: make and run everything anew.
        changes: ``KEY=VALUE`` over keys of the study's file.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.

    Raises:
        UserError: the folder holds something else, or the study's file was edited.
    """
    reporter = reporter or Reporter()
    registry = registry or load_plugins()
    world = build_world(out / "world", seed=seed, steps=steps, fresh=fresh, progress=reporter.note)
    file, root, folder = write_study(out, world, fresh=fresh), out / "run", out.resolve()
    # An adapter names its base from the working folder: so it has the same bytes wherever the demo was called.
    with chdir(folder), _threads(THREADS):
        plan = plan_study(folder / file.name, registry=registry, changes=changes)
        reporter.note(f"study {visible(str(file))}: {counted(plan.arms)}, {len(plan.graph)} steps")
        done = run_study(plan, folder / root.name, fresh=fresh, reporter=reporter)
    reporter.close()
    return Demo(world, root, say(root, done.failures), done.failures)


def write_study(out: Path, world: World, *, fresh: bool = False) -> Path:
    """Write the demo's study into its folder; the file that is there is left as it is, if it says the same.

    Raises:
        UserError: it says something else.
    """
    file = out / "study.yaml"
    # JSON's strings are YAML's, whatever a folder is called.
    lines = STUDY.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(_filled(line, str(world.root.resolve())) for line in lines)
    if file.is_file() and not fresh and file.read_text(encoding="utf-8") != text:
        raise UserError(
            str(file),
            "is not what this demo writes: it was edited, the folder was moved, or another version wrote it",
            f"Run it with `harness study run {file} --out NEW`; or delete it: then it is written anew.",
        )
    write_bytes(file, text.encode())
    return file


def _filled(line: str, world: str) -> str:
    """A line of the study's template with its path, if it has one, quoted."""
    head, sign, tail = line.partition("WORLD")
    if not sign or line.lstrip().startswith("#"):
        return line
    name = next((n for n, c in enumerate(tail) if c in "]}\n"), len(tail))
    prefix = "jsonl:" if head.endswith("jsonl:") else ""
    return head.removesuffix(prefix) + json.dumps(f"{prefix}{world}{tail[:name]}", ensure_ascii=False) + tail[name:]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads for torch as the world was made with: more only wait for each other with a model this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def say(root: Path, failures: Mapping[str, str]) -> Board:
    """Write a study's reports; print its board, what failed, and what it scales to; the last line is the page."""
    from rich.console import Console

    write_all(root, page=False)
    board = write_board([root], root / "report")
    console = Console()
    console.print(board_table(board))
    for name, reason in failures.items():
        console.print(visible(f"failed: {name}: {first_line(reason)}"), markup=False, highlight=False)
    paper = read_study(find_study(Path("paper")))
    scale = f"At full size, `harness study plan paper`: {counted(arms_of(paper))}; {paper.spec.summary}."
    console.print(scale, markup=False, highlight=False)
    page = root / "report" / "report.html"
    console.print(visible(str(page)), markup=False, highlight=False, soft_wrap=True)
    return board
