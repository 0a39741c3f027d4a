"""Running cases one after another, each in a folder of its own; and what they all work on."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from cases import Case, Verdict, run_case
from configurations import FILES, SUMS, Base

SHOWN = 3
ENGINE = Path(__file__).parents[1] / "e2e" / "slow_engine.py"


def make_models(folder: Path) -> Path:
    """Two tiny checkpoints, two adapters, and the folder of a run; what is slow to import is imported by it."""
    import lm_eval.tasks
    import transformers

    from harness.testing import tiny_adapter, tiny_model

    tiny_model(folder / "base")
    tiny_model(folder / "other", seed=5)
    for number in range(2):
        tiny_adapter(folder / f"a{number}", folder / "base", seed=10 + number, rank=2)
    transformers.AutoTokenizer.from_pretrained(folder / "base")
    transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    assert lm_eval.tasks
    files = {**FILES, "tasks/sums.yaml": SUMS}
    command = ["eval", "--model", f"{folder}/base", "--plugin", str(ENGINE), "--tasks", "tasks", "--task", "sums"]
    (folder / "work").mkdir()
    ran = run_case(
        Case("run", [*command, "--engine", "slow", "--out", f"{folder}/run"], files), folder / "work", limit=600
    )
    assert ran.code == 0, ran.said
    return folder


def settled(base: Base, root: Path) -> str:
    """What a command does before it is mutated; it must come to its plan, or mutations would show nothing."""
    with tempfile.TemporaryDirectory(dir=root) as place:
        verdict = run_case(Case(base.name, list(base.arguments), {**FILES, **base.files}), Path(place))
    if verdict.code != 0 and base.name != "endpoint":
        raise SystemExit(f"{base.name} does not work as it stands:\n{verdict.said}\n{verdict.wrong}")
    return verdict.settled


def run_all(
    title: str,
    make: Callable[[int], Case],
    numbers: range | list[int],
    models: Path,
    root: Path,
    plain: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Run cases, each in a folder of its own; print the counts and the first cases of each class."""
    before, begun = digest(models), time.monotonic()
    counts: Counter[str] = Counter()
    codes: Counter[int | None] = Counter()
    classes: defaultdict[str, list[tuple[int, str, Verdict]]] = defaultdict(list)
    for number in numbers:
        case = make(number)
        with tempfile.TemporaryDirectory(dir=root) as place:
            verdict = run_case(case, Path(place))
        if case.meant and verdict.settled and verdict.settled == plain.get(case.base):
            verdict.kind, verdict.wrong = "silent change", f"without effect and without a word: {case.meant}"
        if digest(models) != before:
            verdict.kind, verdict.wrong = "silent change", "the models it was given are not what they were"
        codes[verdict.code] += 1
        counts[verdict.kind or "fine"] += 1
        if verdict.wrong:
            print(f"case {number}: {verdict.kind} {verdict.wrong!a}", file=sys.stderr, flush=True)
            classes[verdict.kind + verdict.wrong.rpartition(" at ")[2]].append((number, case.name, verdict))
        if len(numbers) == 1:
            print(f"harness {' '.join(map(repr, case.arguments))}\n{verdict.said}\n{verdict.kind} {verdict.wrong}")
    ended = dict(sorted(codes.items(), key=str))
    print(f"{title}: {len(numbers)} in {time.monotonic() - begun:.0f} s; exit codes {ended}")
    for kind in ("traceback", "hang", "execution", "silent change", "raw"):
        print(f"  {kind}: {counts[kind]}")
    for found in sorted(classes.values(), key=len, reverse=True):
        print(f"  {len(found)} x {found[0][2].kind}: {found[0][2].wrong!a}")
        for number, name, _ in found[:SHOWN]:
            print(f"      case {number}: {name[:200]!a}")
    return sum(counts.values()) - counts["fine"]


def digest(folder: Path) -> str:
    """Of all files of a folder: nothing that is given may be changed."""
    hashed = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            hashed.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return hashed.hexdigest()
