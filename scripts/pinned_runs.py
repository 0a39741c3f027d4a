"""Rows, ids and artefact digests of a fixed set of small runs, to show that a refactoring moved no number.

    python scripts/pinned_runs.py before.json                  # with the checkout that is on the path
    python scripts/pinned_runs.py after.json --against before.json

Both must be made on one machine (fp32 on another kind of processor may round differently). It knows the command line
and what lies on disk, nothing of the code. Ids may differ where a change says so: the table old -> new is printed; any
other difference is exit 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECIPE = [
    "steps=6",
    "batch_size=4",
    "micro_batch_size=2",
    "eval_rows=5",
    "log_every=1",
    "learning_rate=1e-3",
    "max_length=96",
]
ADAPTER = ["adapter.rank=4", "adapter.alpha=8", "adapter.targets=[q_proj,v_proj]"]
WEIGHTS = ("*.safetensors",)
TASKS = {
    "sums": {"template": "{{ question }}", "prompt": "auto", "scorers": [{"name": "includes"}]},
    "sums_raw": {"template": "{{ question }} =", "prompt": "raw", "scorers": [{"name": "exact_match"}]},
    "sums_hot": {
        "template": "Say: {{ question }}",
        "prompt": "chat",
        "decoding": {"temperature": 1.0, "seed": 3},
        "scorers": [{"name": "includes"}, {"name": "refusal"}],
    },
}


def write_world(root: Path) -> None:
    """A base, rows to align with, and tasks."""
    from harness.testing import tiny_model

    tiny_model(root / "base", seed=1)
    words = [
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
    pairs = [
        {
            "prompt": f"Tell me about {words[i % 14]} and {words[(3 * i + 1) % 14]} {i}",
            "chosen": f"{words[(5 * i + 2) % 14]} is " + "very " * (i % 5) + "good",
            "rejected": f"{words[(7 * i + 3) % 14]} is bad" + " no" * (i % 3),
        }
        for i in range(60)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    sums = [{"id": str(i), "question": f"{i} and {i + 1}", "answer": str(2 * i + 1)} for i in range(12)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (root / "tasks").mkdir()
    for name, task in TASKS.items():
        whole = {
            "name": name,
            "target": "{{ answer }}",
            "dataset": {"name": "jsonl", "options": {"path": str(root / "sums.jsonl")}},
            "decoding": {"max_new_tokens": 8},
            **task,
        }
        whole["decoding"] = {"max_new_tokens": 8, **task.get("decoding", {})}  # type: ignore[dict-item]
        (root / "tasks" / f"{name}.yaml").write_text(json.dumps(whole))


def commands(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Name of a run -> its command line, in order."""
    base = ["--model", "base", "--dtype", "float32"]
    data = ["--dataset", "jsonl:pairs.jsonl"]

    def sets(*pairs: str) -> list[str]:
        return [part for pair in pairs for part in ("--set", pair)]

    recipe = sets(*RECIPE, *ADAPTER)
    for method, adapter in (("sft", "lora"), ("dpo", "lora"), ("dpo", "qlora")):
        out = f"{method}-{adapter}"
        yield out, ["align", method, *base, *data, "--adapter", adapter, *recipe, "--out", out]
    yield "sft-dpo", ["align", "dpo", *base, *data, "--from", "sft-lora", *recipe, "--out", "sft-dpo"]
    search = ["align", "dpo", *base, *data, "--search", "warmup_steps=0,2", *recipe, "--out", "search"]
    yield "search", search
    inputs = ["--inputs", "sft-lora", "dpo-lora"]
    yield "slerp", ["merge", "slerp", "--base", "base", *inputs, "--out", "slerp"]
    yield "dare_ties", ["merge", "dare_ties", "--base", "base", *inputs, "--seed", "5", "--out", "dare_ties"]
    yield "linear", ["merge", "task_arithmetic", "--base", "base", *inputs, "--as", "adapter", "--out", "linear"]
    yield "folded", ["fold", "dpo-lora", "--base", "base", "--out", "folded"]
    asked = [part for name in TASKS for part in ("--task", name)]
    arms = ["--adapter", "sft-lora", "--adapter", "dpo-lora", "--adapter", "linear"]
    yield "eval", ["eval", *base, *arms, "--tasks", "tasks", *asked, "--engine", "transformers", "--out", "eval"]


def run(root: Path, name: str, command: list[str]) -> None:
    """One command of this checkout's harness, in the world's folder."""
    code = "from harness.{} import main; main()"
    module = "cli.app" if (Path(harness_folder()) / "cli" / "app.py").is_file() else "cli"
    print(f"{name}: harness {' '.join(command)}", file=sys.stderr, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code.format(module), *command],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}")


def harness_folder() -> str:
    """Where the harness of this interpreter lies."""
    import harness

    return str(Path(str(harness.__file__)).parent)


def pin(root: Path) -> dict[str, dict[str, Any]]:
    """What is compared: step ids, SHA-256 of weight files, rows of reports, digests of answers and scores."""
    found: dict[str, dict[str, Any]] = {"ids": {}, "bytes": {}, "rows": {}, "answers": {}}
    for file in sorted(root.rglob("*.safetensors")):
        if "checkpoint" not in str(file) and not any(part.startswith(".") for part in file.relative_to(root).parts):
            found["bytes"][str(file.relative_to(root))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in ("step.json", "merge.json", "fold.json"):
        for file in sorted(root.rglob(name)):
            described = json.loads(file.read_text())
            found["ids"][_place(root, file, described)] = described["id"]
    report = json.loads((root / "eval" / "report" / "report.json").read_text())
    for row in report["rows"] + report["leaves"]:
        place = f"{row.get('arm') or row['model']}+{row['adapter']} {row['task']}:{row['variant']} {row['metric']}"
        shown = ("n", "n_unscored", "n_truncated", "mean", "stderr", "ci95")
        found["rows"][place] = {key: row[key] for key in shown}
    for file in sorted(root.glob("eval/steps/*/status.json")):
        described = json.loads((file.parent / "step.json").read_text())
        found["answers"][_place(root, file, described)] = json.loads(file.read_text()).get("digest")
    return found


def _place(root: Path, file: Path, described: dict[str, Any]) -> str:
    relative = file.parent.relative_to(root)
    if "steps" in relative.parts:  # its folder's name ends in the id
        what = [str(described.get(key)) for key in ("kind", "arm", "task", "variant", "scorer") if key in described]
        return f"{relative.parts[0]}: {' '.join(what)} {relative.name.rsplit('-', 1)[0]}"
    return str(relative).removesuffix("step").rstrip("/.")


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what differs; the number of differences that are not ids."""
    wrong = 0
    for kind in ("bytes", "rows", "answers"):
        keys = sorted(before[kind].keys() | after[kind].keys())
        changed = [key for key in keys if before[kind].get(key) != after[kind].get(key)]
        print(f"{kind}: {len(keys) - len(changed)} equal, {len(changed)} different")
        for key in changed:
            print(f"  {key}: {before[kind].get(key)} -> {after[kind].get(key)}")
        wrong += len(changed)
    keys = sorted(before["ids"].keys() | after["ids"].keys())
    changed = [key for key in keys if before["ids"].get(key) != after["ids"].get(key)]
    print(f"ids: {len(keys) - len(changed)} equal, {len(changed)} different")
    for key in changed:
        print(f"  {key}: {str(before['ids'].get(key))[:12]} -> {str(after['ids'].get(key))[:12]}")
    return wrong


def main() -> int:
    """Make the runs, write what is pinned, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the runs; a temporary one when absent")
    arguments = parser.parse_args()
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="pinned-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        write_world(root)
        for name, command in commands(root):
            run(root, name, command)
        found = pin(root)
    finally:
        if arguments.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    arguments.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return min(1, compare(json.loads(arguments.against.read_text()), found)) if arguments.against else 0


if __name__ == "__main__":
    raise SystemExit(main())
