"""Nothing is lost: killed at any moment, or with a file torn, the same command ends with the digests of a whole run."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.processes import Child, Zygote
from tests.study.conftest import Write, records

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
AT_STEP = f"""
import os, signal, harness.alignment.driver as t
real = t.Driven.training_step
def training_step(self, *a, **k):
    loss = real(self, *a, **k)
    if self.state.global_step == 3:
        {KILL}
    return loss
t.Driven.training_step = training_step
"""
AT_FILE = f"""
import os, signal, harness.{{module}} as m
real = m.write_json
def write_json(path, value):
    if {{before}} and path.name == "{{file}}" and "{{within}}" in str(path):
        {KILL}
    real(path, value)
    if path.name == "{{file}}" and "{{within}}" in str(path):
        {KILL}
m.write_json = write_json
"""
IN_ANSWERS = f"""
import os, signal, harness_plugins.engines.transformers.session as s
real, calls = s.TransformersSession.run, []
def run(self, requests):
    calls.append(1)
    if len(calls) == {{call}}:
        {KILL}
    return real(self, requests)
s.TransformersSession.run = run
"""
IN_SCORES = f"""
import os, signal, harness.evaluation.many as m
m.score_all = lambda *a: {KILL}
"""


def at_file(module: str, file: str, within: str, *, before: bool = True) -> str:
    """Killed at a write of this file of a step whose folder begins so."""
    return AT_FILE.format(module=module, file=file, within=within, before=before)


FROM_THE_START = {
    "before the plan": at_file("study.folder", "plan.json", "plan"),
    "in training": AT_STEP,
    "after the record of an adapter": at_file("steps.folder", "status.json", "align-dpo", before=False),
}
ONCE_ADAPTERS_ARE_THERE = {
    "before the record of a merge": at_file("steps.folder", "status.json", "merge-"),
    "before it is known what a merge is": at_file("study.make", "model.json", "merge-"),
    "before weights go": at_file("study.run", "gone.json", "merge-"),
    "after it is said that weights go": at_file("study.run", "gone.json", "merge-", before=False),
    "before the index": at_file("study.folder", "index.json", "index"),
    "in answers": IN_ANSWERS.format(call=2),
    "before scores": IN_SCORES,
    "after the first scores": at_file("steps.folder", "status.json", "scores-", before=False),
}


@pytest.fixture
def study(small: dict[str, Any], write: Write, alone: Path) -> list[str]:
    """The command that carries out `small` into the folder `run`."""
    return ["study", "run", str(write(small)), "--out", "run"]


def killed(study: list[str], patch: str, folder: Path, zygote: Zygote, whole: Path) -> None:
    """Kill the command by a patch of its own, and let it go on: all is as if nothing had been."""
    code, said = zygote.run(study, cwd=folder, patch=patch)
    assert code == -9, said
    code, said = zygote.run(study, cwd=folder)
    assert code == 0, said
    assert records(Path("run")) == records(whole)
    assert not list(Path("run").glob("steps/merge-*/artifact/*.safetensors"))
    assert Path("run/report/tiny/report.json").is_file()


@pytest.mark.parametrize("moment", FROM_THE_START)
def test_killed_at(moment: str, study: list[str], alone: Path, zygote: Zygote, small_run: Path) -> None:
    killed(study, FROM_THE_START[moment], alone, zygote, small_run)


@pytest.mark.parametrize("moment", ONCE_ADAPTERS_ARE_THERE)
def test_killed_later_at(moment: str, study: list[str], alone: Path, zygote: Zygote, small_run: Path) -> None:
    """From where all arms have been aligned, which takes longest."""
    shutil.copytree(small_run, "run")
    for folder in [one for pattern in ("re*", "steps/[ms]*", "steps/an*") for one in Path("run").glob(pattern)]:
        shutil.rmtree(folder)
    Path("run/index.json").unlink()
    killed(study, ONCE_ADAPTERS_ARE_THERE[moment], alone, zygote, small_run)


def test_killed_again_and_again(study: list[str], alone: Path, zygote: Zygote, small_run: Path) -> None:
    """At moments that nobody has chosen: each pass gets a little further, or no further, and none does harm."""
    draw = random.Random(20240604)
    for _ in range(4):
        child = zygote.start(study, cwd=alone)
        time.sleep(draw.uniform(0.5, 3.0))
        os.kill(child.pid, 9)
        child.wait()
    code, said = zygote.run(study, cwd=alone)
    assert code == 0, said
    assert records(Path("run")) == records(small_run)


TORN = (
    *("plan.json", "index.json", "steps/align-dpo-*/status.json", "steps/align-sft-*/step.json"),
    *("steps/align-dpo-*/artifact/adapter_model.safetensors", "steps/align-sft-*/artifact/adapter_config.json"),
    *("steps/merge-*/status.json", "steps/merge-*/model.json", "steps/merge-*/gone.json"),
    *("steps/merge-*/artifact/config.json", "steps/answers-tiny-sums-*/artifact/answers.jsonl.gz"),
    *("steps/answers-tiny+dpo-*/status.json", "steps/scores-tiny+sft-*/artifact/scores.json"),
    *("steps/scores-tiny+merged-*/status.json", "requests/*.jsonl.gz"),
)


@pytest.mark.parametrize("name", TORN)
def test_a_torn_file_is_mended(name: str, study: list[str], alone: Path, zygote: Zygote, small_run: Path) -> None:
    shutil.copytree(small_run, "run")
    file = sorted(Path("run").glob(name))[0]
    os.truncate(file, random.Random(name).randrange(file.stat().st_size))
    code, said = zygote.run(study, cwd=alone)
    assert "Traceback" not in said
    assert code == 0, said
    assert records(Path("run")) == records(small_run)


def test_steps_driven_from_outside_two_at_a_time(
    study: list[str], alone: Path, zygote: Zygote, small_run: Path
) -> None:
    """As a Slurm array or Snakemake would: list what is ready, carry out two at once, until nothing is left."""
    file = study[2]
    rounds, order = 0, []
    while rounds < 20:
        code, said = zygote.run(["study", "steps", file, "--out", "run", "--ready", "--json"], cwd=alone)
        assert code == 0, said
        ready = json.loads(said)
        if not ready:
            break
        for start in range(0, len(ready), 2):
            two: list[Child] = [
                zygote.start(["study", "step", file, row["key"], "--out", "run"], cwd=alone)
                for row in ready[start : start + 2]
            ]
            for child in two:
                assert child.wait() == 0, child.said()
        order.append([row["kind"] for row in ready])
        rounds += 1
    # Both adapters and the base's answers; then the merge, and what is asked of adapters; then of the merge.
    assert set(order[0]) == {"align", "answers"}
    assert records(Path("run")) == records(small_run)
    code, said = zygote.run(study, cwd=alone)
    assert code == 0, said
    assert "align " not in said
