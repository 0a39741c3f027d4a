"""The study of this folder, killed ten times with SIGKILL at moments drawn by chance, and one file torn.

    python kill.py MODELS FOLDER WHOLE [--kills 10] [--seed 0] [--workers 1]

WHOLE is the run folder of an uninterrupted run. Moments are drawn evenly over the seconds of work that its steps
record; one has come once the steps that have ended amount to it, and up to five seconds more. Whatever is under way is
killed, and the same command is given again. After the seventh kill a file of the run is cut at a random byte. In the
end every step must have the id and the digest that it has in WHOLE; what differs is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORN_AFTER = 7


def command(models: Path, run: Path, workers: int = 1) -> list[str]:
    """The one command that all of it is about."""
    bases = [word for name in ("tiny-base", "tiny-instruct") for word in ("--model", f"{name}={models / name}")]
    toxicity = f"evaluation.set.real_toxicity.scorer.model={models / 'tiny-toxicity'}"
    asked = ["harness", "study", "run", str(HERE / "study.yaml"), *bases, "--set", toxicity, "--out", str(run)]
    return [*asked, "--retry-failed", *(["--set", f"executor.workers={workers}"] if workers > 1 else [])]


def ended(run: Path) -> dict[str, str]:
    """Digest of every step of a run by its kind and id."""
    found = {}
    for file in sorted(run.glob("steps/*/status.json")):
        status = json.loads(file.read_text(encoding="utf-8"))
        assert status["status"] == "done", file
        found[f"{file.parent.name.split('-')[0]} {status['id']}"] = status["digest"]
    return found


def tear(run: Path, draw: random.Random) -> str:
    """Cut one file of the run at a random byte, and say which."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size > 1]
    file = draw.choice([path for path in files if "report" not in path.parts])
    at = draw.randrange(file.stat().st_size)
    os.truncate(file, at)
    return f"{file.relative_to(run)} cut to {at} bytes"


def main() -> None:
    """Kill, tear, end, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("folder", type=Path, help="the run folder to be killed")
    parser.add_argument("whole", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    draw, said = random.Random(options.seed), []
    asked = command(options.models.resolve(), options.folder.resolve(), options.workers)
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    moments = sorted(draw.uniform(0.0, work_done(options.whole)) for _ in range(options.kills))
    with (options.folder.parent / "killed.log").open("ab") as log:
        for number, moment in enumerate(moments, 1):
            running = subprocess.Popen(asked, stdout=log, stderr=log, start_new_session=True)
            while running.poll() is None and work_done(options.folder) < moment:
                time.sleep(0.5)
            time.sleep(draw.uniform(0.5, 5.0))
            if running.poll() is not None:
                raise SystemExit(f"ended by itself ({running.returncode}) before kill {number}: see killed.log")
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            kinds: dict[str, int] = {}
            for file in options.folder.glob("steps/*/status.json"):
                kind = file.parent.name.split("-")[0]
                kinds[kind] = kinds.get(kind, 0) + 1
            line: dict[str, Any] = {"kill": number, "ended": kinds, "under_way": under_way(options.folder)}
            if number == TORN_AFTER:
                line["torn"] = tear(options.folder, draw)
            said.append(line)
            print(json.dumps(line, sort_keys=True), flush=True)
        begun = time.monotonic()
        last = subprocess.run(asked, stdout=log, stderr=log)
    print(f"last run: exit code {last.returncode}, {time.monotonic() - begun:.0f} s", flush=True)
    one, other = ended(options.whole), ended(options.folder)
    differ = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    print(f"{len(one)} steps, {len(differ)} differ: {differ[:20]}")
    (options.folder.parent / "killed.json").write_text(
        json.dumps({"seed": options.seed, "kills": said, "steps": len(one), "differ": differ}, indent=1) + "\n"
    )
    sys.exit(bool(differ) or last.returncode)


def work_done(run: Path) -> float:
    """Seconds that the steps which have ended took."""
    done = 0.0
    for file in run.glob("steps/*/status.json"):
        with contextlib.suppress(OSError, ValueError):
            done += json.loads(file.read_text(encoding="utf-8"))["costs"]["seconds"]
    return done


def under_way(run: Path) -> list[str]:
    """Kinds of the steps that had begun and not ended."""
    begun = (file.parent for file in run.glob("steps/*/step.json"))
    return sorted({path.name.split("-")[0] for path in begun if not (path / "status.json").is_file()})


if __name__ == "__main__":
    main()
