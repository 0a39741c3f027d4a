"""This report: `collect` packs the records of the runs, `render` writes all that lies here from them alone.

    python judge.py &                                        the stand-in judge of AlpacaEval
    python build.py run MODELS FOLDER                        the study, uninterrupted, into FOLDER/whole
    python kill.py MODELS FOLDER/killed FOLDER/whole
    python build.py collect FOLDER
    python build.py render

The records hold ids, digests and numbers; no text of a data set and none that a model wrote.
"""

from __future__ import annotations

import io
import json
import lzma
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from kill import command

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
PACKED = RECORDS / "run.tar.xz"
KEPT = ("plan.json", "index.json", "steps/*/step.json", "steps/*/status.json", "steps/*/provenance.json")
SCORES = ("steps/scores-*/artifact/scores.json", "steps/scores-*/artifact/samples.jsonl.gz")
CURVES = ("steps/align-*/log.jsonl", "steps/align-*/result.json")
MADE = ("board.md", "board.csv", "tables", "figures")
"""What of the report is kept beside README.md."""


def run(models: Path, folder: Path) -> None:
    """The study, without interruption."""
    subprocess.run(command(models.resolve(), folder.resolve() / "whole"), check=True)


def collect(folder: Path) -> None:
    """Pack the records of the run, in an order and with times that do not depend on the machine."""
    RECORDS.mkdir(exist_ok=True)
    run_folder = folder / "whole"
    files = sorted({path for pattern in (*KEPT, *SCORES, *CURVES) for path in run_folder.glob(pattern)})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in files:
            data = path.read_bytes()
            entry = tarfile.TarInfo(str(path.relative_to(run_folder)))
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    PACKED.write_bytes(lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    shutil.copyfile(folder / "killed.json", RECORDS / "killed.json")


def unpack(folder: Path) -> Path:
    """The run folder as far as its records go."""
    with tarfile.open(PACKED) as archive:
        archive.extractall(folder, filter="data")
    return folder


def render(out: Path = HERE) -> str:
    """Write board, tables and figures into ``out``, and return the text of README.md."""
    from harness.report.board.write import write_board

    with tempfile.TemporaryDirectory() as scratch:
        root = unpack(Path(scratch) / "run")
        write_board([root], Path(scratch) / "report", layout="paper")
        for name in MADE:
            made = Path(scratch) / "report" / name
            if made.is_dir():
                shutil.rmtree(out / name, ignore_errors=True)
                shutil.copytree(made, out / name)
            else:
                shutil.copyfile(made, out / name)
        board = json.loads((Path(scratch) / "report" / "board.json").read_text(encoding="utf-8"))
        return text(root, board)


INTRODUCTION = """\
# A whole study on tiny models: two bases, 60 arms, five benchmarks

`study.yaml` of this folder: SFT and DPO, with LoRA and QLoRA, on HH-RLHF (harmless) and PKU-SafeRLHF, three seeds, on
two Llama models of 8 million parameters trained on real English text (`tiny-base`, and `tiny-instruct`, the same after
fine-tuning on chat data); a Slerp merge of the two data sets for each base, method and seed; MMLU, BBH, AlpacaEval,
RealToxicityPrompts and DangerousQA, each cut short. The models are far too small, the training too short and the
samples too few for a word about alignment: what is shown is that one command makes all of it, that nothing is lost when
it is killed, and what the board of a study looks like.

* AlpacaEval's judge is `judge.py`, a server on this machine whose verdicts can be checked by hand: the better answer
  shares more of its words with its instruction. The values say nothing about quality. Attack success is told by the
  bundled list of refusals.
* The toxicity classifier is `tiny-toxicity`, far smaller than what one would take in earnest.
* Data sets are parts of the whole, at the revisions that `study.yaml` names.

    python judge.py &
    python build.py run MODELS FOLDER
    python kill.py MODELS FOLDER/killed FOLDER/whole
    python build.py collect FOLDER && python build.py render

Everything below is made from `records/` by `python build.py render`; a test makes it again, and compares every byte.
`records/run.tar.xz` has ids, digests and numbers of every step, and no text of a data set or a model.
"""


def text(root: Path, board: dict[str, Any]) -> str:
    """The page."""
    killed = json.loads((RECORDS / "killed.json").read_text(encoding="utf-8"))
    lines = [INTRODUCTION, "## The board", "", board["finding"], ""]
    lines += ["[board.md](board.md) has the table and every test, `board.csv` its rows, `tables/board.tex` LaTeX.", ""]
    lines += [f"![{file.stem}](figures/{file.name})" for file in sorted((HERE / "figures").glob("*.svg"))]
    lines += ["", "| claim | status | effect | 95 % interval |", "| --- | --- | ---: | --- |"]
    for claim in board["claims"]:
        lines.append(f"| {claim['name']} | {claim['status']} | {_number(claim['effect'])} | {_interval(claim)} |")
    lines += ["", "## Killed", "", *killed_lines(killed), "", "## What it took", "", *cost_lines(root)]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _interval(claim: dict[str, Any]) -> str:
    return "" if claim["ci95"] is None else "{:+.3f} to {:+.3f}".format(*claim["ci95"])


def killed_lines(killed: dict[str, Any]) -> list[str]:
    """When it was killed, and what came of it."""
    kills = killed["kills"]
    told = "none has another digest" if not killed["differ"] else f"**{len(killed['differ'])} differ**"
    lines = [
        f"The same command, killed {len(kills)} times with SIGKILL at moments drawn by chance (seed {killed['seed']}), "
        f"the whole process group at once, and given again each time. Of {killed['steps']} steps (ids and digests "
        f"against those of the board above) {told}. Before the first of these kills the folder had been killed three "
        "times in a trial of the driver, during alignments; and the board's own run took steps that had ended over "
        "(`reuse:`) from two runs that were killed when its list of questions was cut.",
        "",
        "| kill | steps ended | under way | torn afterwards |",
        "| ---: | --- | --- | --- |",
    ]
    for kill in kills:
        ended = ", ".join(f"{count} {kind}" for kind, count in sorted(kill["ended"].items())) or "none"
        lines.append(f"| {kill['kill']} | {ended} | {', '.join(kill['under_way'])} | {kill.get('torn', '')} |")
    return lines


def cost_lines(root: Path) -> list[str]:
    """Seconds of the steps by kind."""
    spent: dict[str, list[float]] = {}
    for file in root.glob("steps/*/status.json"):
        seconds = json.loads(file.read_text(encoding="utf-8"))["costs"]["seconds"]
        spent.setdefault(file.parent.name.split("-")[0], []).append(seconds)
    lines = [
        "One process and one thread, on a machine that did other work beside it.",
        "",
        "| kind | steps | seconds in all | median |",
        "| --- | ---: | ---: | ---: |",
    ]
    for kind, seconds in sorted(spent.items()):
        lines.append(f"| {kind} | {len(seconds)} | {sum(seconds):,.0f} | {statistics.median(seconds):.2f} |")
    return lines


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", models, folder]:
            run(Path(models), Path(folder))
        case ["collect", folder]:
            collect(Path(folder))
        case ["render"]:
            (HERE / "README.md").write_text(render(), encoding="utf-8")
        case _:
            raise SystemExit(__doc__)
