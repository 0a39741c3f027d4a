"""A made preference file, settings that make an alignment fast, and processes of ``harness`` that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = [
    "river",
    "bread",
    "plants",
    "animal",
    "true",
    "number",
    "water",
    "sound",
    "city",
    "letter",
    "snow",
    "tree",
    "moon",
    "field",
]
N_PAIRS = 60
TINY_STEPS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "micro_batch_size": 2,
    "eval_rows": 5,
    "log_every": 1,
    "learning_rate": 1e-3,
}
"""Settings under which an alignment of the tiny model takes about a second."""


def write_preferences(path: Path, count: int = N_PAIRS, **fields: str) -> Path:
    """Pairs of different lengths; ``fields`` overwrite columns."""
    rows = [
        {
            "prompt": f"Tell me about {WORDS[i % 14]} and {WORDS[(3 * i + 1) % 14]} {i}",
            "chosen": f"{WORDS[(5 * i + 2) % 14]} is " + "very " * (i % 5) + "good",
            "rejected": f"{WORDS[(7 * i + 3) % 14]} is bad" + " no" * (i % 3),
            **fields,
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_set(**options: Any) -> list[str]:
    """Options as ``--set`` arguments; a dot in a key is written as two underscores."""
    return [part for key, value in options.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def log_of(out: Path, event: str) -> list[dict[str, Any]]:
    """Lines of an alignment's log about one kind of event."""
    lines = [json.loads(text) for text in (out / "step" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == event]


class Zygote:
    """Starts processes of ``harness`` that have the imports behind them."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self._logs, self._environment, self._count = logs, environment, 0
        script = Path(__file__).parent / "zygote.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, job: dict[str, Any]) -> int:
        """One job, one number."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, arguments: Sequence[str | Path], *, cwd: Path, patch: str = "", **env: str) -> Child:
        """A new process; ``patch`` is Python that it runs first."""
        self._count += 1
        log = self._logs / f"{self._count}.log"
        job = {"run": [str(a) for a in arguments], "log": str(log), "patch": patch, "cwd": str(cwd)}
        return Child(self.ask({**job, "env": {**self._environment, **env}}), log, self)

    def run(self, arguments: Sequence[str | Path], *, cwd: Path, patch: str = "", **env: str) -> tuple[int, str]:
        """A process to its end: exit code, and what it said."""
        child = self.start(arguments, cwd=cwd, patch=patch, **env)
        return child.wait(), child.said()

    def close(self) -> None:
        """End it; its children have been waited for."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()


@dataclass(frozen=True)
class Child:
    """A process of ``harness``."""

    pid: int
    log: Path
    zygote: Zygote

    def wait(self) -> int:
        """Its exit code; negative where a signal ended it."""
        return self.zygote.ask({"wait": self.pid})

    def said(self) -> str:
        """What it wrote to standard output and standard error."""
        return self.log.read_text(encoding="utf-8")
